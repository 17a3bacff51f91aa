"""Timings and widths of the certified bracket; a script, not a test: python tests/accounting/timing.py"""

import time

from sfumato.accounting.calibrate import noise_multiplier
from sfumato.accounting.losses import cells
from sfumato.accounting.pld import epsilon
from table import BRACKETS, CALIBRATION


def main() -> None:
    for name, (rate, sigma, steps, delta, low, high) in BRACKETS.items():
        cells.cache_clear()
        t0 = time.perf_counter()
        result = epsilon(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta)
        t1 = time.perf_counter()
        lower = result.lower
        t2 = time.perf_counter()
        print(
            f"{name} true {low:.7g}..{high:.7g}  upper {result.upper:.7f}"
            f" ({result.upper / high - 1:+.4%}, {t1 - t0:.4f} s)"
            f"  lower {lower:.7f} ({lower / low - 1:+.4%}, {t2 - t1:.4f} s)"
        )
    rows = {**CALIBRATION, "D": (0.05, 1e-8, 1e-3, 1000, 2.9732), "F": (1.0, 1e-6, 1e-4, 10**6, 0.73297)}
    for name, (target, delta, rate, steps, sigma) in rows.items():
        cells.cache_clear()
        t0 = time.perf_counter()
        found = noise_multiplier(target_epsilon=target, target_delta=delta, sample_rate=rate, steps=steps)
        print(f"{name} sigma {found:.6f} ({found / sigma - 1:+.4%} of {sigma}) {time.perf_counter() - t0:.3f} s")


if __name__ == "__main__":
    main()
