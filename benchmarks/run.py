"""Time and memory of Sfumato beside the non-private step and its peers: ``python -m benchmarks.run --help``."""

import argparse
import datetime
import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import engines, memory, table, timing, workloads


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _machine(threads: int) -> str:
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores of an {platform.machine()} CPU ({kind}), {threads} threads"


def measure(name: str, names: list[str], rounds: int, threads: int, with_memory: bool) -> dict[str, Any]:
    """One workload under every engine."""
    work = workloads.WORKLOADS[name]
    steps, errors = timing.prepare(names, work)
    times = timing.interleave(steps, rounds, "non-private")
    noise = timing.noise(work, steps["non-private"], max(3, rounds))
    del steps
    peaks = {n: memory.peak(n, name, threads) for n in times} if with_memory else {}
    return {
        "title": work.title,
        "parameters": sum(p.numel() for p in engines.parameters(work)),
        "engines": {n: asdict(t) | {"peak_mib": peaks.get(n)} for n, t in times.items()},
        "noise": {n: asdict(t) for n, t in noise.items() if n != "non-private"},
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=list(workloads.MAIN), choices=workloads.WORKLOADS)
    parser.add_argument("--engines", nargs="+", default=list(engines.MAIN), choices=engines.ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=engines.CLOCKS, help="cpu: for a machine that others use")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    engines.quiet()
    engines.choose_clock(options.clock)
    names = ["non-private", *(n for n in options.engines if n != "non-private")]
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(options.threads),
        "versions": {p: _version(p) for p in ("torch", "opacus", "sfumato")} | {"python": platform.python_version()},
        "rounds": options.rounds,
        "clock": options.clock,
        "workloads": {},
    }
    for name in options.workloads:
        result["workloads"][name] = measure(name, names, options.rounds, options.threads, not options.no_memory)
        print(table.one(result["workloads"][name]), flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
            options.out.with_suffix(".md").write_text(table.whole(result))
    print(table.whole(result))


if __name__ == "__main__":
    main()
