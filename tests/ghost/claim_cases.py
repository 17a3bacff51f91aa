# fmt: off
# ruff: noqa: E501  (tables of one-line operations)
"""What propagation is asked about: every operation of its tables, in every spelling. See ``claims`` for the letters."""

from collections.abc import Callable
from typing import Any

import torch
from tests.ghost.claims import Case, Op
from torch.nn import functional as F

CASES: list[Case] = []


def case(name: str, spec: str, *ops: Op, wary: Any = (), moving: bool = False, random: bool = False, **sizes: int) -> None:
    """Another case, for each of several specs that are parted by commas."""
    CASES.extend(Case(name, one.strip(), ops, tuple(wary), moving, random, sizes) for one in spec.split(","))


def dims(*calls: Callable[[Any, int], Any], of: tuple[int, ...] = (0, 1, 2, -1, -2)) -> list[Op]:
    """Each call along each dim."""
    return [lambda *xs, f=f, d=d: f(*xs, d) for f in calls for d in of]


D2 = (0, 1, -1)

# -- shapes -----------------------------------------------------------------------------------------------------------

case(
    "view",
    "abc",
    lambda x: x.contiguous().view(-1, x.shape[2]),
    lambda x: x.contiguous().view(x.shape[0], -1),
    lambda x: x.contiguous().view(-1),
    lambda x: x.contiguous().view(torch.int64),
    lambda x: x.contiguous().view(torch.float32),
    lambda x: x.contiguous().view(2, -1, *x.shape[1:]),
    lambda x: x.contiguous().view((*x.shape, 1)),
    lambda x: x.contiguous().view(dtype=torch.int16),
    lambda x: x.contiguous().view(size=(-1,)),
    lambda x: x.float().contiguous().view(torch.float64),
)
case(
    "reshape",
    "abc",
    lambda x: x.reshape(-1, 2),
    lambda x: x.reshape(2, -1),
    lambda x: torch.reshape(x, (-1, x.shape[2])),
    lambda x: x.reshape(shape=(x.shape[0], -1)),
    lambda x: x.reshape(2, 2, -1),
    lambda x: x.reshape(-1, 8),
    lambda x: x.reshape(4, -1, 2),
    lambda x: x.reshape(-1, 2, 2),
    lambda x: x.reshape(x.shape[::-1]),
)
case("reshape", "aa", lambda x: x.repeat(2, 1).reshape(4, 2, -1), lambda x: x.repeat(4, 1).reshape(4, 4, -1), lambda x: x.repeat(1, 2).reshape(2, 4, -1), lambda x: x.repeat_interleave(2, 0).reshape(4, 2, -1), lambda x: x.repeat_interleave(4, 1).reshape(4, 4, -1))
case("flatten", "abc", lambda x: x.flatten(), lambda x: x.flatten(1), lambda x: x.flatten(0, 1), lambda x: x.flatten(-2), lambda x: torch.flatten(x, start_dim=1, end_dim=-1), lambda x: x.flatten(start_dim=0, end_dim=1))
case("unflatten", "abc", lambda x: x.unflatten(0, (2, -1)), lambda x: x.unflatten(-1, (-1, 2)), lambda x: x.unflatten(dim=1, sizes=(2, -1)), lambda x: torch.unflatten(x, 1, (2, -1)))
case(
    "squeeze",
    "abc",
    lambda x: x.unsqueeze(0).squeeze(),
    lambda x: x[:, None].squeeze(1),
    lambda x: x[None].squeeze(-4),
    lambda x: x[None, :, None].squeeze((0, 2)),
    lambda x: x[None].squeeze(dim=0),
    lambda x: torch.squeeze(x[..., None], -1),
    lambda x: x.squeeze(0),
    lambda x: x[:1].squeeze(0),
    lambda x: x[:, :, :1].squeeze(),
)
case("squeeze", "a1b", lambda x: x.squeeze(), lambda x: x.squeeze(1), lambda x: x.squeeze(0), lambda x: x.squeeze((0, 1)), lambda x: x.squeeze(dim=-2))
case("unsqueeze", "abc", *dims(lambda x, d: x.unsqueeze(d), of=(0, 1, 3, -1, -4)), lambda x: x.unsqueeze(dim=1), lambda x: torch.unsqueeze(x, dim=-2))
case("ravel", "abc", lambda x: x.ravel(), lambda x: torch.ravel(x))
case("view_as", "abc bac/c", lambda x, y: x.contiguous().view_as(y), a=4, b=4)
case("view_as", "abc abc", lambda x, y: x.contiguous().view_as(y), lambda x, y: x.contiguous().view_as(y.permute(2, 0, 1)))
case("reshape_as", "abc cba", lambda x, y: x.reshape_as(y), wary=[lambda x, y: torch.zeros(x.shape).reshape_as(y)])
case("expand", "abc", lambda x: x.expand(2, -1, -1, -1), lambda x: x.expand(4, *x.shape), lambda x: x[:, None].expand(-1, 4, -1, -1), lambda x: x[..., None].expand(*x.shape, 4), lambda x: x.expand(size=(4, *x.shape)), wary=[lambda x: x[:1].expand(4, -1, -1), lambda x: x[:, :1].expand(-1, 4, -1)])
case("expand_as", "ab cab", lambda x, y: x.expand_as(y), wary=[lambda x, y: torch.zeros(x.shape).expand_as(y) + x])
case("broadcast_to", "abc", lambda x: x.broadcast_to(2, *x.shape), lambda x: torch.broadcast_to(x, (4, *x.shape)))
case("broadcast_tensors", "ab cab", lambda x, y: torch.broadcast_tensors(x, y), lambda x, y: torch.broadcast_tensors(y, x, x))
case("permute", "abc", lambda x: x.permute(2, 0, 1), lambda x: x.permute((1, 0, 2)), lambda x: torch.permute(x, (-1, 0, 1)), lambda x: x.permute(dims=(0, 2, 1)), lambda x: x.permute(-2, -1, 0))
for name in ("transpose", "swapaxes", "swapdims"):
    case(name, "abc", lambda x, f=name: getattr(x, f)(0, 1), lambda x, f=name: getattr(torch, f)(x, 1, -1), lambda x, f=name: getattr(x, f)(-3, 2))
case("transpose", "abc", lambda x: x.transpose(dim0=0, dim1=2), lambda x: torch.transpose(x, dim0=1, dim1=0))
for name in ("movedim", "moveaxis"):
    case(name, "abc", lambda x, f=name: getattr(x, f)(0, -1), lambda x, f=name: getattr(torch, f)(x, (0, 1), (1, 2)), lambda x, f=name: getattr(x, f)(source=-1, destination=0))
case("t", "ab", lambda x: x.t(), lambda x: torch.t(x))
case("T", "ab", lambda x: x.T)
case("H", "ab", lambda x: x.H)
case("mT", "abc", lambda x: x.mT)
case("mH", "abc", lambda x: x.mH)
case("adjoint", "abc", lambda x: x.adjoint())
case(
    "pad",
    "abc",
    lambda x: F.pad(x, (1, 1)),
    lambda x: F.pad(x, (1, 0, 0, 2)),
    lambda x: F.pad(x, (0, 0, 1, 1)),
    lambda x: F.pad(x, pad=(1, 1), mode="circular"),
    lambda x: F.pad(x, (1, 1), "reflect"),
    lambda x: F.pad(x, (0, 0, 0, 0, 1, 0), value=2.0),
    lambda x: F.pad(x, (-1, 0)),
    lambda x: F.pad(x, (0, 0, -1, 1)),
    wary=[lambda x: F.pad(x, (1, -1, 1, -1, 1, -1))],
)
case("split", "abc", *dims(lambda x, d: x.split(2, d), lambda x, d: torch.split(x, 1, dim=d)), lambda x: x.split(3), lambda x: x.split([1, x.shape[1] - 1], dim=1), lambda x: x.split(split_size=2, dim=1))
case("split_with_sizes", "abc", *dims(lambda x, d: x.split_with_sizes([1, x.shape[d] - 1], d), of=D2))
case("chunk", "abc", *dims(lambda x, d: x.chunk(2, d), of=D2), lambda x: x.chunk(2), lambda x: torch.chunk(x, chunks=2, dim=-2))
case("tensor_split", "abc", *dims(lambda x, d: x.tensor_split(3, d), of=D2), lambda x: torch.tensor_split(x, (1, 3), dim=1), lambda x: x.tensor_split(2))
case("unbind", "abc", *dims(lambda x, d: x.unbind(d)), lambda x: x.unbind(), lambda x: torch.unbind(x, dim=1), lambda x: list(x))
case("narrow", "abc", *dims(lambda x, d: x.narrow(d, 1, 1)), lambda x: torch.narrow(x, dim=1, start=0, length=2), wary=[lambda x: x.narrow(0, -2, 2), lambda x: x.narrow(1, -2, 1), lambda x: x.narrow(0, torch.tensor(1), 1)])
case("select", "abc", *dims(lambda x, d: x.select(d, 1)), lambda x: torch.select(x, dim=-1, index=0))
for name in ("cat", "concat", "concatenate"):
    f = getattr(torch, name)
    case(name, "abc abc", *dims(lambda x, y, d, f=f: f([x, y], d), lambda x, y, d, f=f: f((y, x, y), dim=d), of=D2), lambda x, y, f=f: f([x, y]))
case("cat", "abc", lambda x: torch.cat([x, x[1:]]), lambda x: torch.cat([x, x.flip(1)], 1), lambda x: torch.cat([x[:1], x]), lambda x: torch.cat(tensors=[x, x], dim=-1), wary=[lambda x: torch.cat([x, x.flip(0)], 2)])
case("stack", "abc abc", *dims(lambda x, y, d: torch.stack([x, y], d), of=(0, 1, 2, 3, -1)), lambda x, y: torch.stack((x, y), dim=-2))
case("hstack", "ab ab, abc abc", lambda x, y: torch.hstack([x, y]))
case("vstack", "ab ab, abc abc", lambda x, y: torch.vstack([x, y]))
case("dstack", "abc abc", lambda x, y: torch.dstack([x, y]))
case("hstack", "a a", wary=[lambda x, y: torch.hstack([x, y]), lambda x, y: torch.vstack([x, y]), lambda x, y: torch.dstack([x, y]), lambda x, y: torch.column_stack([x, y])])
case("repeat", "abc", lambda x: x.repeat(2, 1, 1), lambda x: x.repeat(1, 1, 3), lambda x: x.repeat(2, 2, 2), lambda x: x.repeat((2, 1, 1, 1)), lambda x: x.repeat(2, 1, 1, 3), lambda x: x.repeat(repeats=(1, 2, 1)))
case("tile", "abc", lambda x: x.tile(2), lambda x: x.tile((2, 1)), lambda x: torch.tile(x, (2, 1, 1)), lambda x: x.tile(2, 1, 1, 2))
case("repeat_interleave", "abc", *dims(lambda x, d: x.repeat_interleave(2, d)), lambda x: torch.repeat_interleave(x, repeats=2, dim=1), wary=[lambda x: x.repeat_interleave(2), lambda x: x.repeat_interleave(torch.tensor([1, 2]).repeat(x.shape[0] // 2), 0), lambda x: x.repeat_interleave(torch.tensor([2]), 1)])
case("tril", "abc,abcd", lambda x: x.tril(), lambda x: torch.tril(x, diagonal=1))
case("triu", "abc", lambda x: x.triu(), lambda x: x.triu(1))
case("diagonal", "abc,abca", lambda x: x.diagonal(), lambda x: x.diagonal(0, 1, 2), lambda x: torch.diagonal(x, dim1=-1, dim2=0), lambda x: x.diagonal(dim1=-1, dim2=-2), lambda x: x.diagonal(1, dim1=0, dim2=2))
case("unfold", "abc", *dims(lambda x, d: x.unfold(d, 2, 1)), lambda x: x.unfold(dimension=1, size=2, step=2))
case("unfold", "abcd", lambda x: F.unfold(x, 2), lambda x: F.unfold(x, kernel_size=(2, 1), stride=2))
case("fold", "a4b", lambda x: F.fold(x, (2, 2), (2, 2)) if x.shape[2] == 1 else F.fold(x, (2, x.shape[2] + 1), (2, 2)))

# -- index expressions ------------------------------------------------------------------------------------------------

I = torch.tensor([1, 0])  # noqa: E741
PAIR = torch.tensor([[0, 1], [1, 1]])
case(
    "getitem", "abc,abcd",
    lambda x: x[1:], lambda x: x[:, 1:], lambda x: x[::2], lambda x: x[..., ::2], lambda x: x[:, :-1], lambda x: x[None], lambda x: x[:, None], lambda x: x[..., None],
    lambda x: x[0], lambda x: x[:, 0], lambda x: x[..., -1], lambda x: x[0, :, None], lambda x: x[:, 0, None], lambda x: x[None, :, 1], lambda x: x[1:2, ..., 0], lambda x: x[0, ..., 0],
    lambda x: x[I], lambda x: x[:, I], lambda x: x[..., I], lambda x: x[[0, 0, 1]], lambda x: x[:, [1, 0]], lambda x: x[PAIR], lambda x: x[:, PAIR],
    lambda x: x[I, I], lambda x: x[:, I, I], lambda x: x[I[:, None], I], lambda x: x[I[:, None], I[None]], lambda x: x[0, I], lambda x: x[:, 0, I], lambda x: x[I, 0],
    lambda x: x[torch.arange(x.shape[0]) > 0], lambda x: x[:, torch.arange(x.shape[1]) > 0], lambda x: x[torch.ones(x.shape[:2]) > 0], lambda x: x[torch.eye(*x.shape[:2]) > 0], lambda x: x[:, torch.eye(*x.shape[1:3]) > 0],
    lambda x: x[1:, I] if False else x[torch.arange(x.shape[0])], lambda x: x[x.shape[0] - 1 :], lambda x: x[I.tolist()],
    wary=[
        lambda x: x[:, None, I], lambda x: x[None, I], lambda x: x[I, None], lambda x: x[I, :, I], lambda x: x[:, I, None, I], lambda x: x[1:, I], lambda x: x[I, 1:], lambda x: x[0, :, I], lambda x: x[I, :, 0], lambda x: x[I, ..., 0],
        lambda x: x[True], lambda x: x[torch.tensor(True)], lambda x: x[torch.tensor(1)], lambda x: x[torch.tensor(0), 1], lambda x: x[:, torch.tensor(1)], lambda x: x[I.numpy()], lambda x: x[[True] * x.shape[0]], lambda x: x[[[0, 1], [1, 0]]], lambda x: x[range(2)], lambda x: x[torch.eye(*x.shape[:2]) > 0, 0],
        lambda x: x[:0], lambda x: x[(x[0, 0] > 0).long()], lambda x: x[:, (x[:, 0] > 0).long()[..., 0]], lambda x: x[torch.arange(2)[:, None], (x.flatten(2)[:2, :, 0] > 0).long()], lambda x: x[torch.arange(x.shape[0]), (x.flatten(1)[:, 0] > 0).long()],
        lambda x: torch.ones(3, 2)[(x > 0).long()], lambda x: torch.randn(3, 2)[1, (x > 0).long()], lambda x: torch.randn(3, 2)[(x > 0).long(), (x < 0).long()], lambda x: torch.randn(3, 2, 3)[:, (x[..., 0] > 0).long()], lambda x: torch.randn(2, 2)[(x > 0).long(), (x.mean(0) > 0).long()],
    ],
)  # fmt: skip
case("getitem", "a", lambda x: x[1:], lambda x: x[I], lambda x: x[None], wary=[lambda x: x[0], lambda x: x[(x > 0).long()], lambda x: x[torch.tensor([1])]])
case("getitem", "abc abc", wary=[lambda x, y: x[(y[:, 0, 0] > 0).long()], lambda x, y: x[:, (y[0, 0] > 0).long()], lambda x, y: x[torch.arange(x.shape[0]), (y[:, 0, 0] > 0).long()], lambda x, y: x[:, :, (y[:, 0, 0] > 0).long()], lambda x, y: x[torch.arange(2), :, (y[:2, 0, 0] > 0).long()]])
case(
    "getitem",
    "abc",
    lambda x: x[x > 0],
    lambda x: x[x[..., 0] > 0],
    lambda x: x[x[:, 0, 0] > 0],
    lambda x: x[(x[..., 0] > 0).nonzero(as_tuple=True)],
    lambda x: x[torch.where(x[..., 0] > 0)],
    wary=[lambda x: x[:, x[0, :, 0] > 0], lambda x: x[(x > 0) & (torch.arange(x.shape[2]) > 0)].cumsum(0), lambda x: x[x[..., 0] > 0][:2], lambda x: x[x[..., 0] > 0][1:], lambda x: x[x > 0].flip(0), lambda x: x[x[:, 0, 0] > -9][0], lambda x: x[x > 0][: len(x)]],
    moving=True,
)
case("getitem", "abc abc/b", lambda x, m: x[m], lambda x, m: x[m[..., 0]], wary=[lambda x, m: x[m[:, 0, 0].flip(0)], lambda x, m: x[m.flip(0)], lambda x, m: x[:, m[0, :, 0]], lambda x, m: x[m[:, 0, 0]], lambda x, m: x[m.permute(1, 0, 2)[..., 0].reshape(x.shape[:2])] if x.shape[0] == x.shape[1] else x], moving=True)
case(
    "nonzero",
    "ab",
    lambda x: (x > 0).nonzero(),
    lambda x: (x > 0).nonzero(as_tuple=True),
    lambda x: torch.nonzero(x > 0)[:, 0],
    wary=[lambda x: x.flatten()[(x > 0).flatten().nonzero().squeeze(1)], lambda x: (x > 0).nonzero()[0], lambda x: (x > 0).nonzero()[:2], lambda x: (x > 0).nonzero() * 2, lambda x: (x > 0).nonzero().sum(), lambda x: (x > 0).nonzero().flip(0)],
    moving=True,
)
case("argwhere", "ab", lambda x: torch.argwhere(x > 0), moving=True)
case("where", "ab", lambda x: torch.where(x > 0), wary=[lambda x: x[torch.where(x > 0)[0]], lambda x: x[torch.where(x > 0)[1] % x.shape[0]], lambda x: torch.where(x > 0)[0].double()], moving=True)
case(
    "argsort",
    "a",
    lambda x: x.argsort(),
    lambda x: x[x.argsort()],
    lambda x: x.argsort().argsort(),
    lambda x: x[x.argsort()][x.argsort().argsort()],
    wary=[
        lambda x: x[x.argsort()][:2],
        lambda x: x[x.argsort()[:2]],
        lambda x: x[x.argsort()[0]],
        lambda x: x[x.argsort()] * torch.arange(x.shape[0]),
        lambda x: x.argsort().double(),
        lambda x: x.argsort() + 1,
        lambda x: x.sort()[0] - x,
        lambda x: x[(x.argsort() + 1) % x.shape[0]],
        lambda x: x[x.argsort() // 2],
        lambda x: x.sort(descending=True)[0].diff(),
        lambda x: torch.arange(x.shape[0])[x.argsort()],
    ],
    moving=True,
)
case("sort", "a", lambda x: x.sort(), lambda x: torch.sort(x, descending=True), lambda x: x[x.sort()[1]], lambda x: (x > 0).long().sort(stable=True), moving=True)
case(
    "index_copy",
    "a",
    lambda x: torch.zeros_like(x).index_copy(0, x.argsort(), x.sort()[0]),
    wary=[lambda x: torch.zeros_like(x).index_copy(0, x.argsort(), x), lambda x: x.index_copy(0, x.argsort(), x[0].expand(x.shape[0])), lambda x: torch.zeros(x.shape[0]).long().index_copy(0, x.argsort(), torch.arange(x.shape[0]))],
    moving=True,
)
case("index_add", "ab", lambda x: torch.zeros_like(x).index_add(0, (i := x[:, 0].argsort()), x[i].tanh()), wary=[lambda x: torch.zeros_like(x).index_add_(0, x[:, 0].argsort(), x), lambda x: x.index_add(0, x[:, 0].argsort(), torch.ones_like(x)), lambda x: x.index_add(0, x[0].argsort(), x)], moving=True, b=4)
case("histc", "a", wary=[lambda x: torch.histc(x, 3), lambda x: (x > 0).long().bincount(), lambda x: (x > 0).long().bincount().cumsum(0), lambda x: (x > 0).long().bincount() * 2, lambda x: x.histc(2).double()])
case("gather", "abc abc/i", *dims(lambda x, i, d: x.gather(d, i)), lambda x, i: torch.gather(x, dim=-1, index=i), lambda x, i: torch.gather(x, 1, i[:, :1]), lambda x, i: torch.gather(i * 3, 1, i), wary=[lambda x, i: x.gather(1, i[1:]), lambda x, i: x.gather(-1, i.flip(0))])
case(
    "take_along_dim",
    "abc abc/i",
    *dims(lambda x, i, d: x.take_along_dim(i, d), of=D2),
    lambda x, i: torch.take_along_dim(x, i, dim=1),
    lambda x, i: torch.take_along_dim(x, indices=i, dim=-1),
    lambda x, i: x.take_along_dim(x.argsort(1), 1),
    wary=[lambda x, i: x.contiguous().take_along_dim(i.contiguous()), lambda x, i: x.take_along_dim(i[..., :1], -1), lambda x, i: torch.take_along_dim(x, i[:1], 1), lambda x, i: x[:1].take_along_dim(i, 1)],
)
case("index_select", "abc", *dims(lambda x, d: x.index_select(d, I)), lambda x: torch.index_select(x, dim=1, index=I), lambda x: x.index_select(0, torch.tensor([1, 1, 0])))
case("index_select", "abc a/i", *dims(lambda x, i, d: x.index_select(d, i), of=D2), lambda x, i: torch.randn(3, 2).index_select(0, i), lambda x, i: torch.randn(3, 2).index_select(-1, i))

# -- writes -----------------------------------------------------------------------------------------------------------


def put(x: Any, index: Any, value: Any, clone: bool = True) -> Any:
    """x after x[index] = value."""
    x = x.clone() if clone else x
    x[index] = value
    return x


def seen_through(x: Any, write: Callable[[Any], Any], view: Callable[[Any], Any]) -> Any:
    """A view of x that was there before the write."""
    x = x.clone()
    before = view(x)
    write(x)
    return x, before, view(x)


S = slice(None)
case(
    "setitem", "abc abc",
    lambda x, y: put(x, S, y), lambda x, y: put(x, (S, 0), y[:, 0]), lambda x, y: put(x, (S, S, 0), y[:, :, 1]), lambda x, y: put(x, (Ellipsis, 0), y[..., -1]), lambda x, y: put(x, slice(1, None), y[1:]), lambda x, y: put(torch.zeros_like(x), S, y), lambda x, y: put(torch.zeros_like(x), (S, 0), y[:, 0]), lambda x, y: put(torch.zeros(2, *x.shape), 0, y),
    lambda x, y: put(torch.zeros(x.shape[0], 9, x.shape[2]), (S, slice(2, 2 + x.shape[1])), y), lambda x, y: put(x, (S, slice(0, 2)), y[:, -2:]), lambda x, y: put(torch.zeros_like(x), (Ellipsis, slice(0, 2)), y[..., :2]),
    wary=[lambda x, y: put(x, 0, y[1]), lambda x, y: put(x, 0, y[0]), lambda x, y: put(x, S, y.flip(0)), lambda x, y: put(x, slice(1, None), y[:-1]), lambda x, y: put(x, (S, 0), y[:, 0].flip(0)), lambda x, y: put(x, (S, S), y[:1]), lambda x, y: put(x, I, y[:2]), lambda x, y: put(x, (S, I), y[:, :2]), lambda x, y: put(x, (S, I, I), y[:, :2, 0]), lambda x, y: put(x, (I, 0), y[:2, 0]), lambda x, y: put(torch.zeros_like(x), slice(1, None), y[1:]), lambda x, y: put(torch.zeros_like(x), 0, y[0]), lambda x, y: put(torch.zeros_like(x), (S, None), y[:, None]), lambda x, y: put(x, (0, S, 1), y[0, :, 0]), lambda x, y: put(x, S, y[:, 0, 0].sum()), lambda x, y: put(x, S, y[0]), lambda x, y: put(torch.zeros_like(x), S, y[:1]), lambda x, y: put(torch.zeros(4, *x.shape), S, y), lambda x, y: put(x, (y > 0), 0.0), lambda x, y: put(x, (y[:, 0] > 0).any(-1), 0.0), lambda x, y: put(x, y[0, :, 0].argmax() % 2, 1.0), lambda x, y: put(x, (y > 0), y[y > 0])],
)  # fmt: skip
case(
    "setitem",
    "abc",
    lambda x: put(x, (S, 0), 1.0),
    lambda x: put(x, 0, 1.0),
    lambda x: put(x, x > 0, 0.0),
    lambda x: put(x, torch.arange(x.shape[0]) > 0, 2.0),
    lambda x: put(x, I, 0.0),
    lambda x: put(x, x[..., 0] > 0, 0.0),
    lambda x: put(x, x[:, 0, 0] > 0, 0.0),
    lambda x: put(torch.zeros_like(x), x > 0, 1.0),
    wary=[
        lambda x: put(torch.zeros_like(x), x > 0, x[x > 0]),
        lambda x: put(torch.zeros_like(x), x[..., 0] > 0, x[x[..., 0] > 0].tanh()),
        lambda x: put(x, x[0] > 0, 0.0) if x.shape[0] == x.shape[1] == x.shape[2] else x,
        lambda x: put(x, (S, x[0, :, 0] > 0), 0.0),
        lambda x: put(x, (x > 0).flip(0), 0.0),
        lambda x: put(torch.zeros_like(x), (x > 0).flip(0), x[(x > 0).flip(0)]),
        lambda x: put(x, (x[:, 0, 0] > 0).long(), 0.0),
        lambda x: put(torch.zeros(x.shape[0], 2), (torch.arange(x.shape[0]), (x[:, 0, 0] > 0).long()), 1.0),
        lambda x: put(torch.zeros(2), (x[:, 0, 0] > 0).long(), 1.0),
        lambda x: put(torch.zeros(2, x.shape[0]).double(), ((x[:, 0, 0] > 0).long(), torch.arange(x.shape[0])), x[:, 0, 0]),
        lambda x: put(torch.zeros_like(x), (x > 0).nonzero(as_tuple=True), 1.0),
        lambda x: put(x[0].clone(), S, x[1]),
    ],
    moving=True,
)
case(
    "mul",
    "abc",
    lambda x: seen_through(x, lambda z: z.mul_(2), lambda z: z[:, 0]),
    lambda x: seen_through(x, lambda z: z[0].mul_(2), lambda z: z),
    wary=[
        lambda x: seen_through(torch.zeros_like(x), lambda z: z.copy_(x), lambda z: z[0]),
        lambda x: seen_through(torch.zeros_like(x), lambda z: z[0].copy_(x[0]), lambda z: z),
        lambda x: seen_through(torch.zeros_like(x), lambda z: put(z, (S, 0), x[:, 0], False), lambda z: z[:, 0]),
        lambda x: seen_through(torch.zeros(x.shape), lambda z: z.view(-1).copy_(x.reshape(-1)), lambda z: z.t() if z.dim() == 2 else z.mT),
    ],
)
case(
    "add",
    "abc abc",
    lambda x, y: x.clone().add_(y),
    lambda x, y: x.clone().__iadd__(y),
    lambda x, y: torch.add(x, y, alpha=2),
    lambda x, y: x + y,
    lambda x, y: y.__radd__(x),
    lambda x, y: torch.zeros_like(x).add_(y),
    wary=[lambda x, y: x + y.mT if x.shape[1] == x.shape[2] else x, lambda x, y: x.clone().add_(y[:1]), lambda x, y: x + y[:, :1], lambda x, y: x[:, None] + y[None], lambda x, y: x + y[0], lambda x, y: torch.add(x, y, out=torch.zeros_like(x))],
)
case("copy", "abc abc", lambda x, y: x.clone().copy_(y), lambda x, y: torch.zeros_like(x).copy_(y), wary=[lambda x, y: torch.zeros(x.shape[::-1]).copy_(y.permute(2, 1, 0))])
case(
    "index_add",
    "abc abc",
    *dims(lambda x, y, d: x.index_add(d, torch.arange(x.shape[d]).flip(0), y), of=D2),
    lambda x, y: x.index_add(1, torch.zeros(x.shape[1]).long(), y, alpha=2),
    lambda x, y: torch.zeros_like(x).index_add(dim=1, index=torch.zeros(x.shape[1]).long(), source=y),
    lambda x, y: x.clone().index_add_(-1, torch.zeros(x.shape[2]).long(), y),
    wary=[lambda x, y: torch.zeros_like(x).index_add(0, torch.zeros(x.shape[0]).long(), y), lambda x, y: torch.zeros_like(x).index_add(0, torch.arange(x.shape[0]).roll(1), y)],
)
case("index_copy", "abc abc", *dims(lambda x, y, d: x.index_copy(d, torch.arange(x.shape[d]).flip(0), y), of=D2), lambda x, y: torch.zeros_like(x).index_copy_(1, torch.arange(x.shape[1]), y), wary=[lambda x, y: x.index_copy(0, I, y[:2]), lambda x, y: x.index_copy(0, torch.arange(x.shape[0]).roll(1), y)])
case("index_reduce", "abc abc", *dims(lambda x, y, d: x.index_reduce(d, torch.zeros(x.shape[d]).long(), y, "amax"), of=D2))
case("scatter_add", "abc abc/i abc", *dims(lambda x, i, y, d: x.scatter_add(d, i, y), of=D2), lambda x, i, y: torch.zeros_like(x).scatter_add(dim=1, index=i, src=y))
case("scatter_reduce", "abc abc/i abc", *dims(lambda x, i, y, d: x.scatter_reduce(d, i, y, "amax"), of=D2), lambda x, i, y: x.scatter_reduce(1, i, y, reduce="sum", include_self=False))
case(
    "scatter",
    "abc abc/i abc",
    *dims(lambda x, i, y, d: x.scatter(d, i, y), of=D2),
    lambda x, i, y: torch.scatter(x, dim=1, index=i, src=y),
    lambda x, i, y: x.scatter(1, i, 2.0),
    lambda x, i, y: x.scatter(-1, i[..., :1], value=1.0),
    lambda x, i, y: x.clone().scatter_(1, i, y, reduce="add"),
    wary=[lambda x, i, y: torch.zeros_like(x).scatter(1, i[1:], y[1:]), lambda x, i, y: x.scatter(1, i[:-1], y[1:])],
)
case(
    "index_put",
    "abc a",
    wary=[
        lambda x, y: x.index_put((I,), y[0]),
        lambda x, y: x.index_put((torch.arange(x.shape[0]),), y[:, None, None]),
        lambda x, y: x.clone().index_put_((I,), torch.ones(()).double(), accumulate=True),
        lambda x, y: x.masked_scatter(x > 0, y.repeat(x.numel())),
        lambda x, y: x.index_fill(0, I, 1.0),
        lambda x, y: x.select_scatter(x[1], 0, 0),
        lambda x, y: x.slice_scatter(x[:1], 0, 1, 2),
        lambda x, y: torch.put(x, I, y[:2]),
        lambda x, y: x.take(I),
        lambda x, y: x.masked_select(x > 0),
        lambda x, y: x.diagonal_scatter(y[:1].expand(x.diagonal().shape)),
    ],
)
