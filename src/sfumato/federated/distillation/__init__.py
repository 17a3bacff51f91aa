"""Distillation on public data: predictions instead of updates, for models of any architecture."""
