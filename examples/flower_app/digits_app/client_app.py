"""A clinic: its records and its ledger never leave its machine."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from digits_app.federation import LOCAL, UNIT, data, model
from sfumato.federated import All, Client, Worker
from sfumato.integrations.flower import client_app


def make(context: Context) -> tuple[Worker, Client]:
    """From this node's own configuration: where its ledger lies, and which part of the digits stands for its data."""
    config = context.node_config
    held = data(int(config["parts"])).clients
    records = held[sorted(held)[int(config["part"])]]
    client = Client(str(config["client"]), TensorDataset(records.x, records.y), ledger=Path(str(config["ledger"])))
    worker = Worker(
        model(),
        unit=UNIT,
        local=LOCAL,
        train=All(),
        loss=F.cross_entropy,
        rounds=int(context.run_config["rounds"]),
        noise=str(context.run_config["noise"]),
        seed=int(context.run_config["seed"]),
    )
    return worker, client


app = client_app(make)
