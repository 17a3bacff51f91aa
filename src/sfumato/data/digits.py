"""The embedded data set: 1,797 handwritten digits of 8 x 8 pixels (scikit-learn's ``load_digits``, UCI)."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigurationError
from .dataset import SPLIT_SEED, DataSet, records

TEST_RECORDS = 360  # 1,437 to train on


def load_digits(test_fraction: float | None = None) -> DataSet:
    """Fixed, stratified split into 1,437 / 360; pixels are 0..16 by definition and divided by 16."""
    try:
        from sklearn import datasets, model_selection
    except ImportError:
        raise ConfigurationError("'digits' needs scikit-learn.", fix="pip install 'sfumato[cli]'") from None
    bunch = datasets.load_digits()
    x = (bunch.images / 16.0).astype(np.float32)[:, None]
    train_x, test_x, train_y, test_y = model_selection.train_test_split(
        x, bunch.target, test_size=test_fraction or TEST_RECORDS, stratify=bunch.target, random_state=SPLIT_SEED
    )
    return DataSet(
        name="digits",
        kind="digits",
        train=records(train_x, train_y, where="digits, training part"),
        test=records(test_x, test_y, where="digits, test part"),
        classes=tuple(str(name) for name in bunch.target_names),
        checked=("Pixels are divided by 16, the largest value the format allows; nothing is fitted on the records.",),
    )
