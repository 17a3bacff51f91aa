"""Data sets for the command line: tensors in memory, split into train and test, nothing fitted on the records."""

from .dataset import DataSet, Records, as_batch
from .load import load

__all__ = ["DataSet", "Records", "as_batch", "load"]
