"""A process killed while it saves leaves the earlier checkpoint or the new one, whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# One interpreter forks the processes that are killed, so that PyTorch is imported once.
PROGRAM = """
import os, random, signal, sys, time
import torch
from torch import nn
from sfumato.session import checkpoint

path, rng, found = sys.argv[1], random.Random(0), set()
torch.set_num_threads(1)
model = nn.Linear(600, 600)

def save(steps):
    with torch.no_grad():
        model.weight.fill_(steps)
    position = {"steps": steps}
    checkpoint.save(path, module=model, optimizers=[], position=position, plan={}, ledger_head="a" * 64)

save(1)
for _ in range(40):
    if not (child := os.fork()):
        steps = checkpoint.load(path).position["steps"]
        while True:
            steps += 1
            save(steps)
    time.sleep(rng.uniform(0.005, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    stored = checkpoint.load(path)
    checkpoint.apply(stored, model, [])
    assert bool((model.weight == stored.position["steps"]).all())
    found.add(stored.position["steps"])
assert min(os.listdir(os.path.dirname(path))) != os.path.basename(path), "no process was killed while it wrote"
print(len(found))
"""


def test_a_killed_save_leaves_a_whole_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run.ckpt")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
