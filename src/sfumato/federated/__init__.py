"""Federated training with differential privacy: one driver, any transport.

Everything that leaves a client is one flat vector, and everything a server releases is a clipped, weighted and noised
sum of them, charged in a ledger before.
"""

from .allocation import Adaptive, Uniform
from .client.local import LocalTraining
from .client.participant import Client, Stream
from .client.worker import Worker
from .cohorts import FixedCohort, MinSeparation, PoissonCohort
from .distillation.driver import FederatedDistillation
from .distillation.peers import Peer, PeerWorker
from .distillation.predictions import Distill
from .history import Result, Round
from .parameters.selection import All, LastLayers, LoRA, Named, TopK
from .server import Adam, Average, Momentum
from .trainer import FederatedTrainer
from .units import ClientLevel, Distributed, LocalLevel, SampleLevel
from .validation import Validation
from .wire.compression import Prune, Quantize

__all__ = [
    "Adam",
    "Adaptive",
    "All",
    "Average",
    "Client",
    "ClientLevel",
    "Distill",
    "Distributed",
    "FederatedDistillation",
    "FederatedTrainer",
    "FixedCohort",
    "LastLayers",
    "LoRA",
    "LocalLevel",
    "LocalTraining",
    "MinSeparation",
    "Momentum",
    "Named",
    "Peer",
    "PeerWorker",
    "PoissonCohort",
    "Prune",
    "Quantize",
    "Result",
    "Round",
    "SampleLevel",
    "Stream",
    "TopK",
    "Uniform",
    "Validation",
    "Worker",
]
