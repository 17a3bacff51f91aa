"""One training step under each engine: forward, backward, clipping without noise, SGD.

An engine is a function from a workload to ``step()``, a callable that runs one step on the workload's fixed batch and
returns the seconds that the step took. What belongs to drawing and collating the batch is outside the clock.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from .workloads import Workload

CLIP = 1.0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[], float]

_clock = CLOCKS["wall"]


def now() -> float:
    """The chosen clock: wall time, or the processor time of this process (steadier where others use the machine)."""
    return _clock()


def choose_clock(name: str) -> None:
    global _clock
    _clock = CLOCKS[name]


def _timed(body: Callable[[], None]) -> Step:
    def step() -> float:
        start = now()
        body()
        return now() - start

    return step


def nonprivate(work: Workload) -> Step:
    model, x, y, criterion = work.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr)

    def body() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return _timed(body)


def sfumato(work: Workload) -> Step:
    """The public API: the ledger entry is inside the clock. Shuffle over B records draws exactly B each time."""
    import sfumato as sf

    model, x, y, criterion = work.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr)
    engine = sf.PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=work.batch),
        noise_multiplier=0,
        max_grad_norm=CLIP,
        sampling=sf.Shuffle(batch_size=work.batch),
    )

    def draws() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches = draws()

    def step() -> float:
        x, y = next(batches)
        start = now()
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        took = now() - start
        optimizer.zero_grad()
        return took

    step.engine = engine  # type: ignore[attr-defined]  # alive as long as the step
    return step


def _opacus(work: Workload, **how: object) -> Step:
    from opacus.grad_sample import GradSampleModule, GradSampleModuleExpandedWeights
    from opacus.optimizers import DPOptimizer

    model, x, y, criterion = work.build()
    kind = GradSampleModuleExpandedWeights if how.pop("expanded", False) else GradSampleModule
    wrapped = kind(model, loss_reduction="mean", **how)
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=work.lr),
        noise_multiplier=0,
        max_grad_norm=CLIP,
        expected_batch_size=work.batch,
    )

    def body() -> None:
        optimizer.zero_grad()
        criterion(wrapped(x), y).backward()
        optimizer.step()

    return _timed(body)


def opacus_hooks(work: Workload) -> Step:
    return _opacus(work)


def opacus_functorch(work: Workload) -> Step:
    return _opacus(work, force_functorch=True)


def opacus_expanded(work: Workload) -> Step:
    return _opacus(work, expanded=True)


def _opacus_two_pass(work: Workload, use_ghost_clipping: bool) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model, x, y, criterion = work.build()
    wrapped = GradSampleModuleFastGradientClipping(
        model, loss_reduction="mean", max_grad_norm=CLIP, use_ghost_clipping=use_ghost_clipping
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=work.lr),
        noise_multiplier=0,
        max_grad_norm=CLIP,
        expected_batch_size=work.batch,
    )
    loss = DPLossFastGradientClipping(wrapped, optimizer, criterion, loss_reduction="mean")

    def body() -> None:
        optimizer.zero_grad()
        loss(wrapped(x), y).backward()
        optimizer.step()

    return _timed(body)


def opacus_ghost(work: Workload) -> Step:
    return _opacus_two_pass(work, True)


def opacus_fast(work: Workload) -> Step:
    return _opacus_two_pass(work, False)


def vmap_grad(work: Workload) -> Step:
    """torch.func: every per-sample gradient materialised, then clipped and summed."""
    model, x, y, criterion = work.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parameters = dict(model.named_parameters())
    fixed = {n: p.detach() for n, p in parameters.items() if n not in names}

    def loss(trained: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        return criterion(functional_call(model, {**fixed, **trained}, (one[None],)), target[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))

    def body() -> None:
        optimizer.zero_grad()
        grads = per_sample({n: parameters[n].detach() for n in names}, x, y)
        square = sum(g.flatten(1).square().sum(1) for g in grads.values())
        weights = (CLIP / (square.sqrt() + 1e-6)).clamp(max=1) / work.batch
        for name, g in grads.items():
            parameters[name].grad = torch.tensordot(weights, g, dims=1)
        optimizer.step()

    return _timed(body)


ENGINES: dict[str, Callable[[Workload], Step]] = {
    "non-private": nonprivate,
    "Sfumato": sfumato,
    "Opacus hooks": opacus_hooks,
    "Opacus ghost": opacus_ghost,
    "vmap(grad)": vmap_grad,
    "Opacus functorch": opacus_functorch,
    "Opacus expanded": opacus_expanded,
    "Opacus fast": opacus_fast,
}
MAIN = ("non-private", "Sfumato", "Opacus hooks", "Opacus ghost", "vmap(grad)")


def quiet() -> None:
    """Peers warn on every run about hooks and generators; none of it concerns the figures."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def parameters(work: Workload) -> list[Tensor]:
    model: nn.Module = work.build()[0]
    return [p for p in model.parameters() if p.requires_grad]
