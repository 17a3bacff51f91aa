"""Flower reads its switches when it is imported."""

from __future__ import annotations

import os

from sfumato.integrations.flower.switches import SWITCHES

os.environ.update(SWITCHES)
