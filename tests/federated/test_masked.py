"""Distributed: what a client refuses to send."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sfumato.errors import ConfigurationError
from sfumato.federated import Distributed, FederatedTrainer, LocalTraining, SampleLevel
from sfumato.federated.client.participant import Client
from sfumato.federated.secure.masked import MESSAGE, settings
from sfumato.federated.wire.messages import Task
from sfumato.federated.wire.schema import digest


def asked(worker: Any, cohort: tuple[str, ...]) -> Task:
    vector = worker.live.flat.clone()
    return Task(
        run="run",
        round=1,
        nonce="nonce",
        kind="train",
        base=digest(vector, worker.live.frozen),
        schema=worker.live.trained.schema.digest,
        vector=vector.numpy().astype(np.float32),
        settings=settings(cohort, 7),
    )


def test_a_share_is_never_made_for_more_clients_than_were_agreed_on(fed: Any) -> None:
    """A server that declares more of them would get smaller shares of noise."""
    clients = fed.federation(3)
    trainer = FederatedTrainer(
        model=fed.linear(), clients=clients, privacy=Distributed(epsilon=4.0), local=LocalTraining(lr=0.1), rounds=2
    )
    worker, client = trainer.worker(fed.linear(), 3), Client("c0", clients["c0"])
    said = worker.answer(asked(worker, ("c0", "c1", "c2")), client)
    assert said.error is None
    assert set(said.arrays) == {MESSAGE}
    with pytest.raises(ConfigurationError, match="a cohort of 6 was declared"):
        worker.answer(asked(worker, ("c0", "c1", "c2", "c3", "c4", "c5")), client)
    with pytest.raises(ConfigurationError, match="was declared"):
        worker.answer(asked(worker, ("c1", "c2")), client)  # not one of them


def test_what_fails_for_every_client_is_refused_before_anything_is_charged(fed: Any) -> None:
    clients = fed.federation(3)
    with pytest.raises(ConfigurationError, match="fails for the first record of every client"):
        FederatedTrainer(model=fed.linear(d=7), clients=clients, privacy=SampleLevel(epsilon=1.0))
    with pytest.raises(ConfigurationError, match="one number with a gradient"):
        FederatedTrainer(
            model=fed.linear(),
            clients=clients,
            privacy=SampleLevel(epsilon=1.0),
            loss=lambda out, _: out.detach().sum(),
        )


def test_one_broken_client_does_not_keep_the_others_from_training(fed: Any) -> None:
    class Broken(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Any:
            raise OSError("unreadable")

    clients = {"a": Broken(), **fed.federation(2)}
    result = FederatedTrainer(model=fed.linear(), clients=clients, privacy=SampleLevel(epsilon=1.0), rounds=1).fit()
    assert result.rounds[0].rejected == {"client error": 1}
    assert result.rounds[0].accepted == 2


def test_a_late_client_has_spent_what_its_ledger_says(fed: Any) -> None:
    """The reply is not heard; the charge was made."""
    trainer = FederatedTrainer(
        model=fed.linear(), clients=fed.federation(2), privacy=SampleLevel(epsilon=2.0), rounds=1, deadline=1e-9
    )
    result = trainer.fit()
    assert result.rounds[0].accepted == 0
    assert min(result.client_epsilons.values()) > 0.5
    assert result.rounds[0].epsilon == result.epsilon == max(result.client_epsilons.values()) <= 2.0
    assert result.epsilon == pytest.approx(float(result.client_ledgers["c0"].epsilon(delta=1e-5)), rel=1e-6)


def test_a_void_round_costs_nothing_and_ends_as_if_it_had_not_been_asked(fed: Any) -> None:
    """Too few clients: nothing is unmasked, and both the ledger and the accounts give the charge back."""
    transport = fed.Scripted({f"c{k}": lambda task, client: None for k in range(5)})
    trainer = FederatedTrainer(
        model=fed.linear(), transport=transport, privacy=Distributed(epsilon=4.0), local=LocalTraining(lr=0.1), rounds=2
    )
    before = trainer.model.state_dict()
    result = trainer.fit()
    assert [r.rejected for r in result.rounds] == [{"void": 1}] * 2
    assert result.ledger is not None
    assert float(result.ledger.epsilon(delta=1e-5)) == 0.0
    assert [entry["count"] for entry in result.ledger.entries()] == [1, -1] * 2
    assert result.epsilon == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), result.model.state_dict().values(), strict=True))
