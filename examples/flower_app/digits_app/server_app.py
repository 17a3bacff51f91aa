"""The server: it sees private updates only, so that no client has to trust it."""

from __future__ import annotations

import json

import torch
from flwr.app import Context
from flwr.serverapp import Grid
from safetensors.torch import save_model

from digits_app.federation import LOCAL, UNIT, data, pretrained
from sfumato.federated import FederatedTrainer
from sfumato.federated.wire.messages import Scalar
from sfumato.integrations.flower import GridTransport, server_app


def fit(grid: Grid, context: Context) -> dict[str, Scalar]:
    """Train over the clinics that the run configuration names."""
    config = context.run_config
    clients = str(config["clients"]).split(",")
    held = data(len(clients))
    transport = GridTransport(grid, clients=clients, names=str(config["names"]))
    result = FederatedTrainer(
        model=pretrained(held.public),
        transport=transport,
        privacy=UNIT,
        local=LOCAL,
        rounds=int(config["rounds"]),
        deadline=float(config["deadline"]),
        noise=str(config["noise"]),
        seed=int(config["seed"]),
        on_round=lambda round: print(f"round {round.number}: {round.accepted} of {round.cohort}", flush=True),
    ).fit()
    result.model.eval()
    with torch.no_grad():
        right = result.model(held.data.test.x).argmax(1) == held.data.test.y
    if config["out"]:
        save_model(result.model, str(config["out"]))
    return {
        "accuracy": float(right.float().mean()),
        "epsilon": result.epsilon,
        "delta": result.delta,
        "stopped": result.stopped,
        "rounds": json.dumps([[r.cohort, r.accepted, dict(r.rejected), round(r.seconds, 1)] for r in result.rounds]),
        "clients": json.dumps(dict(result.client_epsilons)),
    }


app = server_app(fit)
