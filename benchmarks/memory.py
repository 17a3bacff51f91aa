"""Peak memory of one step above resting, each engine in a process of its own.

Resting is the resident set after a warm step with gradients dropped and free heap returned to the system. The kernel's
high-water mark (VmHWM) is then reset, one step runs, and the mark is read again: everything counts, scratch space of
native kernels included. glibc is told to return large blocks at once (MALLOC_MMAP_THRESHOLD_), or what earlier steps
had freed would hide what this one needs. Linux only; elsewhere the table has no memory column.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from .engines import ENGINES, quiet
from .timing import first_line
from .workloads import WORKLOADS

_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _rest() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def child(engine: str, workload: str, threads: int, steps: int = 3) -> dict[str, object]:
    """Run in the subprocess: the median peak above resting, in bytes."""
    import torch

    torch.set_num_threads(threads)
    quiet()
    try:
        step = ENGINES[engine](WORKLOADS[workload])
        step()
        peaks = []
        for _ in range(steps):
            _drop_gradients()
            _rest()
            Path("/proc/self/clear_refs").write_text("5")
            resting = _status("VmRSS")
            step()
            peaks.append(_status("VmHWM") - resting)
        return {"peak": sorted(peaks)[len(peaks) // 2]}
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is the result
        return {"error": first_line(error)}


def _drop_gradients() -> None:
    """The baseline starts every step without gradients, so that each engine pays for the ones it makes."""
    import torch

    for thing in gc.get_objects():
        if isinstance(thing, torch.nn.Parameter):
            thing.grad = None
            for name in ("grad_sample", "summed_grad", "_norm_sample"):
                if getattr(thing, name, None) is not None:
                    setattr(thing, name, None)


def peak(engine: str, workload: str, threads: int) -> float | None:
    """MiB above resting, or None where it cannot be measured."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", engine, workload, str(threads)],
        env=os.environ | _ENVIRONMENT,
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        check=False,
        text=True,
    )
    if answer.returncode:
        return None
    result = json.loads(answer.stdout.splitlines()[-1])
    return result["peak"] / 2**20 if "peak" in result else None


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
