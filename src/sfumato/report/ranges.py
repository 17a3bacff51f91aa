"""Values of ε that others chose, with their sources: a scale to read one's own ε against, never a threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """``epsilon``: the published value or range; ``unit``: what one ε there protects, and where the noise was added."""

    name: str
    epsilon: str
    unit: str
    source: str


TIERS = "Ponomareva et al. 2023, How to DP-fy ML; Xu, Zhang 2024, Google Research"
CONTEXT = (
    "ε alone decides little: the unit, what is released, who is trusted and how it was implemented count as much "
    "(Near, Darais, Lefkovitz, Howarth 2025, NIST SP 800-226)."
)
SETTINGS = (
    Setting("Deep learning, research benchmarks", "0.5 to 8", "one image, central", "De et al. 2022"),
    Setting("Language model trained privately (VaultGemma)", "2", "1,024 tokens, central", "Google Research 2025"),
    Setting("Keyboard language models (Gboard)", "0.994 to 13.69", "one device, federated", "Xu, Zhang 2024"),
    Setting("Suggested replies (assistive AI)", "4", "one user, central", "Microsoft 2020"),
    Setting("Audience statistics, per month", "34.9", "one user, central", "Rogers et al. 2020, LinkedIn"),
    Setting("US Census 2020, redistricting data", "17.14", "one person, central", "US Census Bureau 2021"),
    Setting("Device statistics (iOS, macOS), per use case and day", "2 to 16", "one user, local", "Apple 2017"),
)


def tier(epsilon: float) -> str:
    """Where ε stands on the scale of Ponomareva et al. 2023 for machine learning with a small δ."""
    if not math.isfinite(epsilon):
        return "no formal protection"
    if epsilon <= 1:
        return "strong formal protection (ε at most 1)"
    if epsilon <= 10:
        return "reasonable protection (ε at most 10)"
    return "weak or no formal protection by ε alone (above 10)"
