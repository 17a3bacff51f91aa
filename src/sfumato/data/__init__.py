"""Data sets for the command line: tensors in memory, split into train and test, nothing fitted on the records."""

from .clients import FederatedData, by_column, dirichlet, simulated, stratified
from .dataset import DataSet, Records, as_batch
from .load import load, load_federated

__all__ = [
    "DataSet",
    "FederatedData",
    "Records",
    "as_batch",
    "by_column",
    "dirichlet",
    "load",
    "load_federated",
    "simulated",
    "stratified",
]
