"""Interleaved timing in one process: engines take turns, so that what disturbs the machine disturbs all alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .engines import ENGINES, Step, now, parameters
from .workloads import Workload

TURN_SECONDS = 0.4  # an engine repeats short steps until its turn has lasted this long, at most MOST times
MOST = 20


@dataclass(frozen=True)
class Timing:
    """Seconds a step (median over rounds) and ratios to the baseline of the same round: median, quartiles."""

    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def prepare(names: Sequence[str], work: Workload) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps that ran twice as a warm-up, and the error of each engine that cannot run."""
    steps: dict[str, Step] = {}
    errors: dict[str, str] = {}
    for name in names:
        try:
            step = ENGINES[name](work)
            step()
            step()
            steps[name] = step
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is the result
            errors[name] = first_line(error)
    return steps, errors


def _turn(step: Callable[[], float]) -> float:
    times: list[float] = []
    start = time.perf_counter()
    while not times or (len(times) < MOST and time.perf_counter() - start < TURN_SECONDS):
        times.append(step())
    return statistics.median(times)


def interleave(steps: dict[str, Step], rounds: int, base: str) -> dict[str, Timing]:
    """Every engine once a round, each round starting with another one."""
    names = list(steps)
    rows: dict[str, list[float]] = {n: [] for n in names}
    for k in range(rounds):
        shift = k % len(names)
        for name in names[shift:] + names[:shift]:
            rows[name].append(_turn(steps[name]))
    out = {}
    for name in names:
        ratios = sorted(t / b for t, b in zip(rows[name], rows[base], strict=True))
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else [ratios[0]] * 3
        out[name] = Timing(statistics.median(rows[name]), quartiles[1], quartiles[0], quartiles[2], rounds)
    return out


def noise(work: Workload, base: Step, rounds: int) -> dict[str, Timing]:
    """Noise over every trainable parameter, as a ratio to the non-private step."""
    from sfumato.noise import Secure

    shapes = [p.shape for p in parameters(work)]
    secure = Secure()

    def timed(draw: Callable[[torch.Size], object]) -> Step:
        def step() -> float:
            start = now()
            for shape in shapes:
                draw(shape)
            return now() - start

        return step

    steps = {
        "non-private": base,
        "torch.randn": timed(torch.randn),
        "secure": timed(lambda shape: secure.normal(tuple(shape), std=1.0)),
    }
    return interleave(steps, rounds, "non-private")
