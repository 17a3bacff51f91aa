"""What accounting and the ledger cost: ``python -m benchmarks.bookkeeping [FILE.md]``.

CPU time, medians of five; fresh σ each time, so that nothing is answered from a cache.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sfumato.accounting import Budget, Event, Ledger, compose, epsilon, noise_multiplier

RUNS = {
    "MNIST, 3,516 steps": (256 / 6e4, 1.1, 3516, 1e-5),
    "language model, 5,000 steps": (2048 / 1e6, 0.6, 5000, 1e-7),
    "10,000 steps": (0.01, 1.0, 10_000, 1e-5),
    "1,000,000 steps": (1e-4, 1.0, 10**6, 1e-6),
}
TARGETS = {
    "ε = 1, MNIST": (1.0, 1e-5, 256 / 6e4, 3516),
    "ε = 3, 10,000 steps": (3.0, 1e-5, 0.01, 10_000),
    "ε = 8, CIFAR": (8.0, 1e-5, 4096 / 5e4, 2000),
    "ε = 1, 1,000,000 steps": (1.0, 1e-6, 1e-4, 10**6),
}
STEPS = 300


def cpu_ms(call: Callable[[int], object], times: int = 5) -> float:
    found = []
    for k in range(times):
        start = time.process_time()
        call(k)
        found.append(time.process_time() - start)
    return statistics.median(found) * 1e3


def rows() -> list[tuple[str, str]]:
    out = []
    for name, (rate, sigma, steps, delta) in RUNS.items():
        spent = epsilon(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta)
        gap = spent.upper / spent.lower - 1
        took = cpu_ms(
            lambda k, r=rate, s=sigma, t=steps, d=delta: epsilon(
                noise_multiplier=s * (1 + 1e-6 * (k + 1)), sample_rate=r, steps=t, delta=d
            )
        )
        out.append((f"ε: {name}", f"{took:.1f} ms, bracket {100 * gap:.3f} % wide"))

    def schedule(k: int) -> dict[Event, int]:
        return {Event("poisson-gaussian", 1 + i / 1000 + 1e-7 * k, 0.01, "add-remove"): 1 for i in range(1000)}

    out.append(("ε: 1,000 different σ", f"{cpu_ms(lambda k: compose(schedule(k), delta=1e-5)):.0f} ms"))
    for name, (target, delta, rate, steps) in TARGETS.items():
        took = cpu_ms(
            lambda k, e=target, d=delta, r=rate, t=steps: noise_multiplier(
                target_epsilon=e * (1 + 1e-6 * k), target_delta=d, sample_rate=r, steps=t
            ),
            times=3,
        )
        out.append((f"σ for {name}", f"{took:.0f} ms"))
    with tempfile.TemporaryDirectory() as folder:
        for kind, path in (("memory", None), ("file", Path(folder) / "ledger.db")):
            with Ledger(path) as ledger:
                out += ledger_rows(kind, ledger)
    return out


def ledger_rows(kind: str, ledger: Ledger) -> list[tuple[str, str]]:
    event, budget = Event("poisson-gaussian", 1.1, 0.01, "add-remove"), Budget(8.0, 1e-5)

    def timed(call: Callable[[int], object]) -> str:
        cpu, wall = time.process_time(), time.perf_counter()
        for step in range(STEPS):
            call(step)
        spent, passed = (time.process_time() - cpu) / STEPS, (time.perf_counter() - wall) / STEPS
        return f"{spent * 1e3:.3f} ms CPU, {passed * 1e3:.3f} ms"

    def live(step: int) -> None:
        ledger.append(event, run="live", step=step)
        ledger.epsilon(delta=1e-5)

    found = [
        (f"{kind}: append", timed(lambda step: ledger.append(event, run="a", step=step))),
        (f"{kind}: append and ε", timed(live)),
        (f"{kind}: append within a budget", timed(lambda k: ledger.append(event, run="b", step=k, budget=budget))),
    ]
    with ledger.reserve(event, STEPS, run="c", step=0) as reserved:
        found.append((f"{kind}: a reserved step", timed(lambda _: reserved.use())))
    return found


def main() -> None:
    lines = ["| What | Cost |", "|---|---|", *(f"| {name} | {cost} |" for name, cost in rows())]
    text = "\n".join(lines) + "\n"
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text("# Accounting and ledger\n\nA step is one release.\n\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
