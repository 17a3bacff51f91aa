"""What went wrong once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from sfumato.accounting import Event, compose
from sfumato.errors import ConfigurationError
from sfumato.federated import (
    Adaptive,
    Client,
    ClientLevel,
    Distributed,
    FederatedTrainer,
    LocalTraining,
    SampleLevel,
    Stream,
    Validation,
)
from sfumato.federated.validation import correct
from sfumato.report import covering, envelope, profile


class Breaks(Dataset):
    """Its disk fails in the middle of a round."""

    def __init__(self, data: Any) -> None:
        self.data, self.read = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        self.read += 1
        if self.read > 50:
            raise OSError("disk")
        return self.data[i]


def test_steps_of_a_client_that_failed_are_reported(fed: Any) -> None:
    broken = Client("broken", Breaks(fed.records(30)))
    trainer = FederatedTrainer(
        model=fed.linear(),
        clients={"broken": broken, "sound": fed.records(seed=1)},
        privacy=SampleLevel(epsilon=2.0),
        local=LocalTraining(epochs=4, batch_size=10),
        rounds=2,
    )
    result = trainer.fit()
    assert result.client_epsilons["broken"] == float(broken.ledger.epsilon(delta=1e-5)) > 0.0
    assert dict(result.rounds[0].rejected) == {"client error": 1}


def test_a_stream_is_asked_for_its_rounds_only(fed: Any) -> None:
    asked: list[int] = []

    def draw(round: int) -> Any:
        asked.append(round)
        return fed.records(20 + round, seed=round)

    client = Client("a", Stream(draw), validation=fed.records(seed=50))
    trainer = FederatedTrainer(
        model=fed.linear(), clients={"a": client}, privacy=SampleLevel(epsilon=2.0), rounds=3, validation=Validation()
    )
    result = trainer.fit()
    assert set(asked) == {1, 3, 5}
    assert [r.accepted for r in result.rounds] == [1, 1, 1]
    assert 1.9 < result.epsilon <= 2.0


def test_one_client_spends_most_at_one_delta_and_another_at_others() -> None:
    few = {Event("poisson-gaussian", 2.0, 1.0, "add-remove"): 2}
    many = {Event("poisson-gaussian", 0.55, 0.003, "add-remove"): 600}
    shown = dict(envelope([profile(events) for events in covering([few, many, few])]))
    assert len(covering([few, many, few])) == 2
    for delta, epsilon in shown.items():
        assert epsilon == max(float(compose(events, delta=delta)) for events in (few, many))
    assert compose(few, delta=1e-3) > compose(many, delta=1e-3)
    assert compose(few, delta=1e-9) < compose(many, delta=1e-9)


def test_many_histories_are_covered_by_few_that_are_no_better() -> None:
    histories = [
        {
            Event("poisson-gaussian", 0.8 + 0.01 * k, 0.01 + 0.003 * k, "add-remove"): 40 - k,
            Event("gaussian", 20.0 + k, 1.0, "add-remove"): 1,
        }
        for k in range(12)
    ]
    cover = covering(histories, most=4)
    assert len(cover) == 4
    for k, history in enumerate(histories):
        for delta in (1e-3, 1e-6, 1e-9):
            assert compose(history, delta=delta) <= compose(cover[k // 3], delta=delta)
    assert covering(histories) == histories


def test_budgets_of_a_secure_sum_last_for_noise_that_is_chosen_on_the_way(fed: Any) -> None:
    result = FederatedTrainer(
        model=fed.linear(),
        clients=fed.federation(),
        privacy=Distributed(epsilon=2.0),
        allocation=Adaptive(),
        validation=Validation(public=fed.records(seed=9), patience=None),
        rounds=2,
    ).fit()
    assert (result.stopped, len(result.rounds)) == ("rounds", 2)
    assert 1.9 < result.epsilon <= 2.0


class Wrapped(nn.Module):
    """Scores in a record of their own, as models of transformers have them."""

    def __init__(self, named: str) -> None:
        super().__init__()
        self.inner, self.named = nn.Linear(3, 2), named

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(**{self.named: self.inner(x)})


@pytest.mark.parametrize("private", [True, False])
def test_progress_is_measured_or_refused(fed: Any, private: bool) -> None:
    def measured(named: str) -> float:
        clients = {"a": Client("a", fed.records(), validation=fed.records(seed=1) if private else None)}
        trainer = FederatedTrainer(
            model=Wrapped(named),
            clients=clients,
            privacy=SampleLevel(epsilon=2.0),
            loss=lambda found, y: nn.functional.cross_entropy(getattr(found, named), y),
            validation=Validation(public=None if private else fed.records(seed=1)),
            rounds=1,
        )
        found = trainer.fit().rounds[0].measure
        assert found is not None
        return found

    assert 0.0 <= measured("logits") <= 1.0
    with pytest.raises(ConfigurationError, match="share of records"):
        measured("scores")


def test_arguments_of_other_types_are_refused(fed: Any) -> None:
    for changes in ({"clients": [fed.records()]}, {"local": 3}, {"validation": "yes"}):
        with pytest.raises(ConfigurationError):
            FederatedTrainer(
                **{"model": fed.linear(), "clients": fed.federation(), "privacy": SampleLevel(epsilon=2.0)} | changes
            )


@pytest.mark.parametrize(
    ("scores", "y"),
    [
        (torch.zeros(5, 7, 3), torch.zeros(5, 7, dtype=torch.int64)),  # a record would count seven times
        (torch.zeros(5, 3), torch.zeros(5, 1, dtype=torch.int64)),  # and here, compared with everyone's target, five
    ],
)
def test_a_record_counts_once_in_a_measure(scores: torch.Tensor, y: torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match="share of records"):
        correct(nn.Identity(), scores, y)


def test_a_record_counts_once_in_counts_of_classes(fed: Any) -> None:
    x = torch.randn(20, 3)
    trainer = FederatedTrainer(
        model=fed.linear(),
        clients={"a": TensorDataset(x, torch.zeros(20, 7, dtype=torch.int64))},
        privacy=SampleLevel(epsilon=2.0),
        loss=lambda found, y: nn.functional.cross_entropy(found, y[:, 0]),
        allocation=Adaptive(clients=True),
        validation=Validation(public=fed.records(seed=9)),
        classes=2,
    )
    with pytest.raises(ConfigurationError, match="for each record"):
        trainer.fit()


def test_layers_that_cannot_train_on_one_record_are_not_refused(fed: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    trainer = FederatedTrainer(
        model=model, clients=fed.federation(), privacy=ClientLevel(epsilon=2.0), local=LocalTraining(batch_size=10)
    )
    assert trainer.noise_multiplier > 0.0
