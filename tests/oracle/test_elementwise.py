# ruff: noqa: E501  (tables of one-line models)
"""Elementwise operations with a parameter in every broadcast position, and bare parameters in every disguise."""

import operator

import torch
from tests.oracle.oracle import B, Net, R, case, check, matrix
from torch import nn
from torch.nn import functional as F

POSITIONS = {
    "scalar": (),
    "one": (1,),
    "vector": (5,),
    "per position": (3, 1),
    "full": (3, 5),
    "lead": (1, 3, 5),
    "ones": (1, 1, 1),
}
OPERATIONS = {
    "x + p": lambda x, p: x + p,
    "p + x": lambda x, p: p + x,
    "x - p": lambda x, p: x - p,
    "p - x": lambda x, p: p - x,
    "x * p": lambda x, p: x * p,
    "p / x": lambda x, p: p / (x * x + 1),
    "x / p": lambda x, p: x / (p * p + 1),
    "x ** p": lambda x, p: (x * x + 0.1) ** (p * p + 0.1),
    "p ** x": lambda x, p: (p * p + 0.1) ** x,
    "x += p": operator.iadd,
    "x -= p": operator.isub,
    "x *= p": operator.imul,
    "x.add_": lambda x, p: x.add_(p),
    "x.mul_": lambda x, p: x.mul_(p),
    "x.div_": lambda x, p: x.div_(p * p + 1),
    "add alpha": lambda x, p: torch.add(x, p, alpha=3),
    "sub alpha": lambda x, p: torch.sub(p, x, alpha=3),
    "rsub": lambda x, p: torch.rsub(x, p),
    "lerp weight": lambda x, p: torch.lerp(x, x * 2 + 1, p),
    "lerp end": lambda x, p: torch.lerp(x, p.expand(x.shape[1:]) if p.dim() < 3 else p, 0.3),
    "addcmul": lambda x, p: torch.addcmul(p, x, x, value=0.5),
    "addcmul middle": lambda x, p: torch.addcmul(x, p, x),
    "addcdiv": lambda x, p: torch.addcdiv(x, p, x * x + 1),
    "clamp min": lambda x, p: torch.clamp(x, min=p),
    "clamp both": lambda x, p: x.clamp(p, p + 1),
    "maximum": torch.maximum,
    "minimum": lambda x, p: torch.minimum(p, x),
    "torch.max": torch.max,
    "where value": lambda x, p: torch.where(x > 0, p, x),
    "where other": lambda x, p: torch.where(x > 0, x, p),
    "where two": lambda x, p: torch.where(x > 0, p, p * 2),
    "where condition": lambda x, p: torch.where(p > 0, x, p),
    "atan2": torch.atan2,
    "hypot": torch.hypot,
    "logaddexp": torch.logaddexp,
    "xlogy": lambda x, p: torch.xlogy(p, x * x + 1),
    "gate": lambda x, p: x * torch.sigmoid(p) + (1 - torch.sigmoid(p)) * x.tanh(),
    "exp": lambda x, p: x * p.exp() + p.log1p() if False else x * p.exp(),
    "detached twice": lambda x, p: x * p.detach() + p,
    "by number": lambda x, p: x * float(p.detach().sum()) + p,
    "p twice": lambda x, p: (x + p) * p,
    "p with p": lambda x, p: x + p * p.tanh(),
    "softmax of p": lambda x, p: x * (p.softmax(-1) if p.dim() else p),
    "type_as": lambda x, p: x + p.type_as(x),
    "to": lambda x, p: x + p.to(x.dtype),
}

ELEMENTWISE = [
    case(f"{name}-{position}", lambda op=op, shape=shape: Net(lambda s, x: op(s.l(x) * 1, s.p), l=nn.Linear(5, 5), p=shape), lambda: (R(B, 3, 5),))
    for name, op in OPERATIONS.items()
    for position, shape in POSITIONS.items()
]  # fmt: skip
ELEMENTWISE += [
    case(f"{name}-{where}", lambda op=op, shape=shape: Net(lambda s, x: op(s.c(x) * 1, s.p), c=nn.Conv2d(3, 3, 1), p=shape), lambda: (R(B, 3, 4, 5),))
    for name in ("x * p", "x += p", "p - x", "where value", "clamp min")
    for op in (OPERATIONS[name],)
    for where, shape in {"per channel": (3, 1, 1), "per pixel": (4, 5), "per row": (4, 1), "channel and column": (1, 3, 1, 5)}.items()
]  # fmt: skip


@matrix(ELEMENTWISE)
def test_elementwise(case, dtype):
    check(case, dtype)


def bare(name, forward, shapes, inputs=lambda: (R(B, 3, 5),), tier="rule", **more):
    return case(name, lambda: Net(forward, l=nn.Linear(5, 5), **shapes), inputs, tier, **more)


def in_place(s, x, change):
    c = s.c.repeat(x.shape[0], 1, 1)
    change(c)
    return s.l(x) * c


def assigned(s, x, order):
    out = torch.zeros(x.shape[0], 4, 5, dtype=x.dtype)
    for what in order:
        if what == "token":
            out[:, 0] = s.c
        else:
            out[:, 1:] = x
    return s.l(out)


def set_channel(s, x):
    h = s.l(x).clone()
    h[:, :, 1:3] = s.c
    h[..., 0] *= s.g
    return h


N = None
BARE = [
    bare("expand", lambda s, x: s.l(x) + s.c.expand(3, 5), {"c": (1, 5)}),
    bare("expand_as", lambda s, x: s.l(x) + s.c.expand_as(x), {"c": (5,)}, tier="vmap"),
    bare("expand over the batch", lambda s, x: s.l(x) + s.c.expand(x.shape[0], -1, -1), {"c": (1, 1, 5)}),
    bare("expand over the batch, T==B", lambda s, x: s.l(x) + s.c.expand(x.shape[0], -1, -1), {"c": (1, 1, 5)}, lambda: (R(B, B, 5),)),
    bare("repeat over the batch", lambda s, x: s.l(x) + s.c.repeat(x.shape[0], 1, 1), {"c": (3, 5)}),
    bare("tile", lambda s, x: s.l(x) + s.c.tile(x.shape[0], 3, 1), {"c": (1, 5)}),
    bare("repeat_interleave", lambda s, x: s.l(x) + s.c.repeat_interleave(x.shape[0], 0), {"c": (1, 3, 5)}),
    bare("repeat then *=", lambda s, x: in_place(s, x, lambda c: c.mul_(2)), {"c": (3, 5)}, tier="vmap"),
    bare("repeat then zero a column", lambda s, x: in_place(s, x, lambda c: c.__setitem__((slice(N), slice(N), 0), 0)), {"c": (1, 5)}, tier="vmap"),
    bare("repeat then add positions", lambda s, x: in_place(s, x, lambda c: c.add_(s.g)), {"c": (3, 5), "g": (3, 5)}, tier="vmap"),
    bare("repeat then += records", lambda s, x: operator.iadd(s.c.repeat(x.shape[0], 1, 1), s.l(x)), {"c": (3, 5)}, tier="vmap"),
    bare("slice", lambda s, x: s.l(x) + s.c[: x.shape[1]], {"c": (9, 5)}),
    bare("slice, T==B", lambda s, x: s.l(x) + s.c[: x.shape[1]], {"c": (9, 5)}, lambda: (R(B, B, 5),)),
    bare("stepped slice", lambda s, x: s.l(x) + s.c[::3], {"c": (9, 5)}),
    bare("index", lambda s, x: s.l(x) + s.c[2] + s.c[-1], {"c": (9, 5)}),
    bare("list index", lambda s, x: s.l(x) + s.c[[2, 0, 2]], {"c": (9, 5)}),
    bare("index_select", lambda s, x: s.l(x) + s.c.index_select(0, torch.tensor([1, 1, 3])), {"c": (9, 5)}),
    bare("cat of parameters", lambda s, x: s.l(x) * torch.cat([s.c, s.g, s.c[:1]]), {"c": (2,), "g": (2,)}),
    bare("stack of parameters", lambda s, x: s.l(x) * torch.stack([s.c, s.g, s.c], 0), {"c": (5,), "g": (5,)}),
    bare("transpose", lambda s, x: s.l(x) + s.c.t(), {"c": (5, 3)}),
    bare("permute", lambda s, x: s.l(x) + s.c.permute(2, 0, 1), {"c": (3, 5, 1)}),
    bare("reshape", lambda s, x: s.l(x) + s.c.reshape(3, 5), {"c": (15,)}),
    bare("unbind", lambda s, x: s.l(x) * s.c.unbind(0)[0] + s.c.unbind(0)[1], {"c": (2, 5)}),
    bare("chunk", lambda s, x: s.l(x) * s.c.chunk(2)[0] + s.c.chunk(2)[1], {"c": (10,)}),
    bare("split", lambda s, x: s.l(x) * s.c.split([5, 1])[0] + s.c.split([5, 1])[1], {"c": (6,)}),
    bare("pad", lambda s, x: s.l(x) + F.pad(s.c, (1, 2)), {"c": (2,)}),
    bare("sum", lambda s, x: s.l(x) * s.c.sum(), {"c": (2, 3)}),
    bare("norm", lambda s, x: s.l(x) * s.c / s.c.norm(), {"c": (5,)}),
    bare("tril", lambda s, x: s.c.tril() @ s.l(x), {"c": (3, 3)}),
    bare("interpolated positions", lambda s, x: s.l(x) + F.interpolate(s.c, size=3, mode="linear").mT, {"c": (1, 5, 6)}),
    bare("relative bias by a constant index", lambda s, x: (x @ x.mT + s.c[torch.arange(9).view(3, 3) % 5]).softmax(-1) @ s.l(x), {"c": (5,)}),
    bare("relative bias per head", lambda s, x: (x @ x.mT + s.c[torch.arange(9) % 5].view(3, 3, 2).permute(2, 0, 1).unsqueeze(1)).softmax(-1).sum(0) @ s.l(x), {"c": (5, 2)}, same_forward=True),
    bare("cls by expand and cat", lambda s, x: s.l(torch.cat([s.c.expand(x.shape[0], -1, -1), x], 1)), {"c": (1, 1, 5)}),
    bare("cls by repeat and cat", lambda s, x: s.l(torch.cat([s.c.repeat(x.shape[0], 1, 1), x], 1)), {"c": (1, 1, 5)}),
    bare("cls by arithmetic", lambda s, x: s.l(torch.cat([s.c.expand(x.shape[0], -1, -1) * 2 + s.g, x], 1)), {"c": (1, 1, 5), "g": (5,)}),
    bare("cls last", lambda s, x: s.l(torch.cat([x, s.c.expand(x.shape[0], 1, 5)], -2))[:, -1] + x.mean(1), {"c": (5,)}),
    bare("cls by zeros + c", lambda s, x: s.l(torch.cat([torch.zeros(x.shape[0], 1, 5, dtype=x.dtype) + s.c, x], 1)), {"c": (5,)}),
    bare("cls by stack", lambda s, x: s.l(torch.stack([s.c.expand(x.shape[0], 5), x[:, 0]], 1)), {"c": (5,)}),
    bare("cls by stack, middle", lambda s, x: s.l(torch.stack([x, s.c.expand(x.shape[0], 3, 5)], 2)), {"c": (5,)}),
    bare("cls (T,B,d)", lambda s, x: s.l(torch.cat([s.c.expand(1, x.shape[0], 5), x.transpose(0, 1)], 0)).transpose(0, 1), {"c": (5,)}),
    bare("cls assigned, token first", lambda s, x: assigned(s, x, ("token", "records")), {"c": (5,)}, tier="microbatch"),
    bare("cls assigned, records first", lambda s, x: assigned(s, x, ("records", "token")), {"c": (5,)}),
    bare("channels assigned", set_channel, {"c": (2,), "g": ()}, same_forward=True),
    bare("mask token where", lambda s, x: s.l(torch.where(x[..., :1] > 0, s.c, x)), {"c": (5,)}),
    bare("mask token by mask", lambda s, x: s.l(x * (x > 0) + s.c * (x <= 0)), {"c": (5,)}),
    bare("mask token by setitem", lambda s, x: (lambda h: (h.__setitem__(x[..., 0] > 0, s.c), s.l(h))[1])(x.clone()), {"c": (5,)}, same_forward=True),
    bare("masked_fill with a parameter", lambda s, x: s.l(x.masked_fill(x > 0, s.c)), {"c": ()}, tier="microbatch"),
    bare("learned queries attend", lambda s, x: (s.c @ s.l(x).mT).softmax(-1) @ x, {"c": (2, 5)}),
    bare("learned queries expanded", lambda s, x: torch.bmm(s.c.expand(x.shape[0], -1, -1), s.l(x).mT).softmax(-1) @ x, {"c": (2, 5)}, tier="vmap"),
    bare("learned queries, sdpa", lambda s, x: F.scaled_dot_product_attention(s.c.expand(x.shape[0], -1, -1), s.l(x), x), {"c": (2, 5)}, tier="vmap"),
    bare("parameter shaped like the batch", lambda s, x: s.l(x) + s.c, {"c": (3, 5)}, lambda: (R(3, 3, 5),)),
    bare("zero-dim reaches no gradient elsewhere", lambda s, x: s.l(x).sum(1) * s.c, {"c": ()}),
    bare("unused parameter", lambda s, x: s.l(x), {"c": (5,)}),
    bare("unused branch", lambda s, x: (s.l(x) + s.c, (x * s.g).tanh())[0], {"c": (5,), "g": (5,)}),
    bare("parameter times zero", lambda s, x: s.l(x) + 0 * s.c, {"c": (5,)}),
    bare("only a parameter reaches the output", lambda s, x: x * s.c, {"c": (5,)}),
]  # fmt: skip


@matrix(BARE)
def test_bare_parameter(case, dtype):
    check(case, dtype)


DERIVED = [
    case("low rank adapter", lambda: Net(lambda s, x: F.linear(x, s.w + s.b @ s.a), w=(6, 5), a=(2, 5), b=(6, 2)), lambda: (R(B, 3, 5),)),
    case("lora, frozen base", lambda: Net(lambda s, x: F.linear(x, s.w) + (x @ s.a.T) @ s.b.T * 0.5, w=nn.Parameter(R(6, 5), requires_grad=False), a=(2, 5), b=(6, 2)), lambda: (R(B, 3, 5),)),
    case("packed projection by chunk", lambda: Net(lambda s, x: sum(F.linear(x, w, b) ** k for k, (w, b) in enumerate(zip(s.w.chunk(3), s.b.chunk(3), strict=True), 1)), w=(12, 5), b=(12,)), lambda: (R(B, 3, 5),)),
    case("packed projection by slices", lambda: Net(lambda s, x: F.linear(x, s.w[:4], s.b[:4]) * F.linear(x, s.w[4:], s.b[4:]), w=(8, 5), b=(8,)), lambda: (R(B, 3, 5),)),
    case("packed and whole", lambda: Net(lambda s, x: F.linear(x, s.w).sum(-1, keepdim=True) + F.linear(x, s.w[:4]), w=(8, 5)), lambda: (R(B, 3, 5),)),
    case("tied to its transpose", lambda: Net(lambda s, x: F.linear(F.linear(x, s.w).tanh(), s.w.t()), w=(7, 5)), lambda: (R(B, 3, 5),)),
    case("tied to its transpose, square", lambda: Net(lambda s, x: F.linear(F.linear(x, s.w).tanh(), s.w.t()), w=(5, 5)), lambda: (R(B, 3, 5),)),
    case("transpose contiguous", lambda: Net(lambda s, x: F.linear(x, s.w.t().contiguous()), w=(5, 7)), lambda: (R(B, 3, 5),)),
    case("transpose of a transpose", lambda: Net(lambda s, x: F.linear(x, s.w.T.T), w=(7, 5)), lambda: (R(B, 3, 5),)),
    case("transpose reshaped", lambda: Net(lambda s, x: F.linear(x, s.w.t().reshape(7, 5)), w=(7, 5)), lambda: (R(B, 3, 5),)),
    case("transpose reshaped to other widths", lambda: Net(lambda s, x: F.linear(x, s.w.t().reshape(8, 3)), w=(6, 4)), lambda: (R(B, 2, 3),)),
    case("reshape transposed", lambda: Net(lambda s, x: F.linear(x, s.w.reshape(4, 6).t()), w=(6, 4)), lambda: (R(B, 2, 4),)),
    case("vector reshaped to a matrix", lambda: Net(lambda s, x: F.linear(x, s.w.view(7, 5)), w=(35,)), lambda: (R(B, 3, 5),)),
    case("3-d weight permuted", lambda: Net(lambda s, x: F.linear(x, s.w.permute(1, 0, 2).reshape(6, 4)), w=(2, 3, 4)), lambda: (R(B, 3, 4),)),
    case("transpose copied then changed", lambda: Net(lambda s, x: F.linear(x, s.w.t().contiguous().mul_(2)), w=(5, 5)), lambda: (R(B, 3, 5),), "vmap"),
    case("weight norm by hand", lambda: Net(lambda s, x: F.linear(x, s.g * s.v / s.v.norm(dim=1, keepdim=True)), g=(6, 1), v=(6, 5)), lambda: (R(B, 3, 5),)),
    case("weight_norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), lambda: (R(B, 3, 5),)),
    case("weight_norm of a convolution", lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), lambda: (R(B, 2, 6),)),
    case("spectral_norm in eval mode", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6)), lambda: (R(B, 3, 5),), train=False),
    case("orthogonal", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(5, 5)), lambda: (R(B, 3, 5),), tol32=1e-4),
    case("spectral by svd", lambda: Net(lambda s, x: F.linear(x, s.w / torch.linalg.matrix_norm(s.w, 2)), w=(6, 5)), lambda: (R(B, 3, 5),), tol32=1e-4),
    case("scaled weight", lambda: Net(lambda s, x: F.linear(x, s.w * 0.1), w=(6, 5)), lambda: (R(B, 3, 5),)),
    case("weight scaled by a parameter", lambda: Net(lambda s, x: F.linear(x, s.w * s.g.exp(), s.b + s.g), w=(6, 5), g=(), b=(6,)), lambda: (R(B, 3, 5),)),
    case("masked weight", lambda: Net(lambda s, x: F.linear(x, s.w * torch.eye(6, 5, dtype=x.dtype)), w=(6, 5)), lambda: (R(B, 3, 5),)),
    case("symmetric weight", lambda: Net(lambda s, x: F.linear(x, s.w + s.w.T), w=(5, 5)), lambda: (R(B, 3, 5),)),
    case("matrix exponential", lambda: Net(lambda s, x: F.linear(x, torch.matrix_exp(s.w - s.w.T)), w=(5, 5)), lambda: (R(B, 3, 5),)),
    case("hyper network of a constant", lambda: Net(lambda s, x: F.linear(x, s.h(torch.ones(1, 2, dtype=x.dtype)).view(3, 5)), h=nn.Linear(2, 15)), lambda: (R(B, 3, 5),)),
    case("hyper network of the records", lambda: Net(lambda s, x: torch.einsum("bi,bio->bo", x, s.h(x).view(-1, 5, 3)), h=nn.Linear(5, 15)), lambda: (R(B, 5),)),
    case("sum of weights as bias", lambda: Net(lambda s, x: F.linear(x, s.w, s.w.sum(1)), w=(6, 5)), lambda: (R(B, 3, 5),)),
    case("codebook distances", lambda: Net(lambda s, x: (x.pow(2).sum(-1, keepdim=True) - 2 * x @ s.w.T + s.w.pow(2).sum(1)), w=(6, 5)), lambda: (R(B, 3, 5),)),
    case("fourier features", lambda: Net(lambda s, x: torch.cat([torch.sin(x @ s.w), torch.cos(x @ s.w)], -1) @ s.v, w=(5, 4), v=(8, 2)), lambda: (R(B, 3, 5),)),
]  # fmt: skip


@matrix(DERIVED)
def test_derived_parameter(case, dtype):
    check(case, dtype)
