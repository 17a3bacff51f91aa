"""Federated digits over Flower."""
