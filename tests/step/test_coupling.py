"""Models in which one record reaches another: each must be refused, or move the sum by no more than C."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from tests.step.harness import distance, loss, mlp, released, world
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf

B = 8


class Mixing(nn.Module):
    """h = encode(x); h = mix(h); decode(h)."""

    def __init__(self, mix: Callable[[Tensor], Tensor]):
        super().__init__()
        self.encode, self.decode, self.mix = nn.Linear(5, 5), nn.Linear(5, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.mix(self.encode(x)))


def _write(index: object, value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def mix(h: Tensor) -> Tensor:
        h = h.clone()
        h[index] = value(h)
        return h

    return mix


def _copy_row(h: Tensor) -> Tensor:
    h = h.clone()
    h[0].copy_(h[1])
    return h


def _data_row(h: Tensor) -> Tensor:
    h = h.clone()
    h.data[0] = h.data[1]
    return h


def _constant(fill: Callable[[Tensor, Tensor], object]) -> Callable[[Tensor], Tensor]:
    def mix(h: Tensor) -> Tensor:
        buffer = torch.zeros(5)
        fill(buffer, h.detach())
        return h - buffer

    return mix


def _hook(h: Tensor) -> Tensor:
    h.register_hook(lambda g: g.sum(0).expand_as(g))
    return h


def _no_grad_mean(h: Tensor) -> Tensor:
    with torch.no_grad():
        mean = h.mean(0)
    return h - mean


def _sorted_in_place(h: Tensor) -> Tensor:
    h = h.clone()
    torch.sort(h.detach(), 0, out=(h.data, torch.empty(h.shape, dtype=torch.long)))
    return h


def _autograd_inside(h: Tensor) -> Tensor:
    (towards,) = torch.autograd.grad(h.square().sum().sqrt(), h, retain_graph=True)
    return h + towards


class _Centre(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, a: Tensor) -> Tensor:
        return a - a.mean(0)

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g - g.mean(0)


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(0),
    "detached mean": lambda h: h - h.detach().mean(0),
    "mean without gradient": _no_grad_mean,
    "softmax over records": lambda h: h.softmax(0),
    "cumsum": lambda h: h.cumsum(0),
    "flip": lambda h: h + h.flip(0),
    "roll": lambda h: h + h.roll(1, 0),
    "roll of all": lambda h: h + torch.roll(h, 5),
    "sort": lambda h: h + h.sort(0).values,
    "gram": lambda h: h @ h.t() @ h,
    "max": lambda h: h / h.abs().amax(),
    "normalize": lambda h: F.normalize(h, dim=0),
    "einsum": lambda h: h + torch.einsum("bi,ci->c", h, h)[:, None],
    "permutation": lambda h: h + h[torch.arange(B - 1, -1, -1) % len(h)],
    "index_select": lambda h: h + h.index_select(0, torch.arange(len(h)).flip(0)),
    "layer norm over records": lambda h: F.layer_norm(h.t(), (len(h),)).t(),
    "attention over records": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "written: shifted": _write(slice(1, None), lambda h: h[:-1].clone()),
    "written: mean": _write(slice(None), lambda h: h.mean(0)),
    "written: other row": _write(0, lambda h: h[1]),
    "written: column mean": _write((slice(None), 0), lambda h: h[:, 0].mean()),
    "copied row": _copy_row,
    "row written under .data": _data_row,
    "constant: copy_": _constant(lambda b, h: b.copy_(h.mean(0))),
    "constant: copy_ through a slice": _constant(lambda b, h: b[:].copy_(h.mean(0))),
    "constant: add_ through a view": _constant(lambda b, h: b.view(-1).add_(h.mean(0))),
    "constant: out=": _constant(lambda b, h: torch.mean(h, 0, out=b)),
    "constant: setitem": _constant(lambda b, h: b.__setitem__(slice(None), h.mean(0))),
    "new_tensor": lambda h: h - h.new_tensor(h.detach().mean(0)),
    "full_like": lambda h: h - torch.full_like(h, h.detach().mean()),
    "new_full": lambda h: h - h.new_full((5,), h.detach().mean()),
    "written through two outputs": _sorted_in_place,
    "gradient of a coupled value": _autograd_inside,
    "rows leave in another order: cat": lambda h: torch.cat([h[1:], h[:1]]),
    "rows leave in another order: split": lambda h: torch.cat([*h.split(1)[1:], h[:1]]),
    "rows leave in another order: flat index": lambda h: h.view(-1)[torch.arange(h.numel()).roll(5)].view(h.shape),
    "torch.tensor": lambda h: h - torch.tensor(h.detach().mean(0).tolist()),
    "numpy": lambda h: h - torch.from_numpy(h.detach().mean(0).numpy()),
    "item": lambda h: h / h.abs().max().item(),
    "hook": _hook,
    "custom Function": lambda h: _Centre.apply(h),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MIXES)
def test_mixing_the_records_is_refused(name: str) -> None:
    x, y = torch.randn(B, 5) * 10, torch.randint(0, 3, (B,))
    w = world(Mixing(MIXES[name]), (x, y), everybody=True, batch_size=B)
    with pytest.raises(sf.SfumatoError):
        released(w)
    assert w.engine.steps == w.charges == 0
    assert not w.grads


# Without a rule for the record axis: run one record at a time, where they cannot mix, or refused.
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "gather": lambda h: h + h.gather(0, torch.arange(len(h)).flip(0)[:, None].expand(-1, 5)),
    "index_add": lambda h: h + torch.zeros_like(h).index_add(0, torch.zeros(len(h), dtype=torch.long), h),
    "cdist": lambda h: h * torch.cdist(h, h).sum(1, keepdim=True),
    "quantile": lambda h: h - h.quantile(0.5, 0),
    "windows": lambda h: h + h.unfold(0, 1, 1)[..., 0],
    "linalg norm": lambda h: h / torch.linalg.norm(h, 2, 0),
}


@pytest.mark.parametrize("name", ALONE)
def test_an_operation_without_a_rule_is_refused_or_bounded(name: str) -> None:
    torch.manual_seed(3)
    x, y = torch.randn(B, 5) * 10, torch.randint(0, 3, (B,))

    def sums(indices: list[int]) -> dict[str, Tensor]:
        torch.manual_seed(4)
        return released(world(Mixing(ALONE[name]), (x, y), indices=indices, noise_multiplier=0.0, max_grad_norm=0.5))

    try:
        everybody = sums(list(range(B)))
    except sf.SfumatoError:
        return
    for gone in range(B):
        assert distance(everybody, sums([i for i in range(B) if i != gone])) <= 0.5 * (1 + 1e-6)


class OwnLoss(nn.Module):
    """A model that returns its loss."""

    def __init__(self, reduce: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.linear, self.reduce = nn.Linear(5, 3), reduce

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.linear(x)
        return self.reduce(F.cross_entropy(logits, y, reduction="none"), logits, y)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "product of means": lambda each, logits, y: each.mean() * logits.square().mean(),
    "ratio of means": lambda each, logits, y: each.mean() / (1 + logits.square().mean()),
    "in-place product": lambda each, logits, y: each.sum().mul_(logits.detach().mean()),
    "divided by a count": lambda each, logits, y: (each * (y > 0)).sum() / (y > 0).sum(),
    "divided by a count as a number": lambda each, logits, y: (each * (y > 0)).sum() / (y > 0).float().sum().item(),
    "mean of a selection": lambda each, logits, y: each[y > 0].mean(),
    "class weights": lambda each, logits, y: F.cross_entropy(logits, y, weight=torch.tensor([0.1, 1.0, 5.0])),
    "ignored targets": lambda each, logits, y: F.cross_entropy(logits, y, ignore_index=0),
    "maximum of sums": lambda each, logits, y: torch.maximum(each.sum(), logits.sum()),
    "clamped sum": lambda each, logits, y: each.sum().clamp(max=1.0),
    "square of the sum": lambda each, logits, y: each.sum().square(),
    "logsumexp": lambda each, logits, y: each.logsumexp(0),
    "worst record": lambda each, logits, y: each.max(),
    "standard deviation": lambda each, logits, y: each.std(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_couples_the_records_is_refused(name: str) -> None:
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    w = world(OwnLoss(LOSSES[name]), (torch.randn(B, 5), y), everybody=True, batch_size=B, loss_reduction="sum")
    with pytest.raises(sf.SfumatoError):
        released(w, lambda m, x, t: m(x, t))
    assert w.engine.steps == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_plain_loss_of_the_model_itself_works(reduction: str) -> None:
    def total(each: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        return (each.mean() + 0.1 * logits.square().sum(1).mean()) if reduction == "mean" else each.sum() * 2

    x, y = torch.randn(B, 5), torch.randint(0, 3, (B,))
    w = world(OwnLoss(total), (x, y), everybody=True, batch_size=B, loss_reduction=reduction, noise_multiplier=0.0)
    assert released(w, lambda m, x, t: m(x, t))


class Remembers(nn.Module):
    """Keeps a statistic of the private records in a buffer after using it, as BatchNorm does."""

    def __init__(self, remember: Callable[[Remembers, Tensor], object]):
        super().__init__()
        self.encode, self.decode, self.remember = nn.Linear(5, 5), nn.Linear(5, 3), remember
        self.register_buffer("memory", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)
        out = self.decode(h - self.memory)
        with torch.no_grad():
            self.remember(self, h.detach())
        return out


def _assign(m: Remembers, h: Tensor) -> None:
    m.memory = 0.9 * m.memory + 0.1 * h.mean(0)


def _assign_data(m: Remembers, h: Tensor) -> None:
    m.memory.data = 0.9 * m.memory + 0.1 * h.mean(0)


BUFFERS: dict[str, Callable[[Remembers, Tensor], object]] = {
    "in place": lambda m, h: m.memory.mul_(0.9).add_(h.mean(0)),
    "copy_": lambda m, h: m.memory.copy_(h.mean(0)),
    "assigned": _assign,
    "assigned .data": _assign_data,
    "slice": lambda m, h: m.memory.__setitem__(slice(None), h.mean(0)),
    "one record": lambda m, h: m.memory.copy_(h[0]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_may_not_take_private_statistics(name: str) -> None:
    model = Remembers(BUFFERS[name])
    w = world(model, (torch.randn(B, 5), torch.randint(0, 3, (B,))), everybody=True, batch_size=B)
    with pytest.raises(sf.SfumatoError):
        released(w)
    assert w.engine.steps == 0


def test_spectral_norm_may_update_its_buffers() -> None:
    """They are functions of the weights alone."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3))
    w = world(model, everybody=True, noise_multiplier=0.0)
    assert released(w)


@dataclasses.dataclass
class Box:
    z: Tensor


class Boxed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, box: Box) -> Tensor:
        return self.out(self.a(x) + self.b(box.z - box.z.mean(0)))


def test_records_inside_an_object_are_not_taken_for_constants() -> None:
    w = world(Boxed(), (torch.randn(B, 5), torch.randint(0, 3, (B,))), everybody=True, batch_size=B)
    with pytest.raises(sf.SfumatoError):
        released(w, lambda m, x, y: F.cross_entropy(m(x, Box(x * 1.0)), y))
    assert w.engine.steps == 0


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.decode(self.encode(x)).mean(1))


def test_activations_that_come_back_with_two_possible_record_axes_are_refused() -> None:
    """Submodules called from the loop: T == B after a transpose must not be taken for the records."""
    w = world(Parts(), (torch.randn(B, B, 4), torch.randint(0, 3, (B,))), everybody=True, batch_size=B)

    def outside(m: Parts, x: Tensor, y: Tensor) -> Tensor:
        h = m.decode(m.encode(x).transpose(0, 1).contiguous()).transpose(0, 1)
        return F.cross_entropy(m.out(h.mean(1)), y)

    with pytest.raises(sf.SfumatoError):
        released(w, outside)
    assert w.engine.steps == 0


def test_submodules_called_from_the_loop_clip_like_the_model() -> None:
    """A hand-written forward over the submodules is the same training."""

    def sums(compute: Callable[..., Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(1)
        x, y = torch.randn(B, 5), torch.randint(0, 3, (B,))
        return released(world(mlp(), (x, y), everybody=True, noise_multiplier=0.0, max_grad_norm=0.1), compute)

    def by_hand(m: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m[2](m[1](m[0](x))), y)

    assert distance(sums(loss), sums(by_hand)) < 1e-6
