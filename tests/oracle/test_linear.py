# ruff: noqa: E501  (tables of one-line models)
"""Linear layers of any rank, and every spelling of a product with a weight on either side."""

import torch
from tests.oracle.oracle import B, Net, R, case, check, matrix
from torch import nn
from torch.nn import functional as F

LINEAR = [
    case(f"rank{len(shape)}-bias{bias}-{reduction}", lambda shape=shape, bias=bias: nn.Linear(5, 7, bias=bias),
         lambda shape=shape: (R(shape),), reduction=reduction)
    for shape in [(B, 5), (B, 6, 5), (B, 2, 3, 5), (B, 2, 3, 2, 5), (B, 2, 1, 2, 2, 5), (B, B, 5), (B, 1, 5), (B, 40, 5)]
    for bias in (True, False)
    for reduction in ("mean", "sum")
]  # fmt: skip

LINEAR += [
    case("wide rows through the Gram", lambda: nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 30)), lambda: (R(B, 3, 30),)),
    case("mlp in-place relu", lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), lambda: (R(B, 5),)),
    case("one record", lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), lambda: (R(1, 2, 5),)),
    case("frozen weight", lambda: _freeze(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), "0.weight", "2.weight"), lambda: (R(B, 2, 5),)),
    case("frozen bias", lambda: _freeze(nn.Linear(5, 7), "bias"), lambda: (R(B, 2, 5),)),
    case("through a frozen layer", lambda: _freeze(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)), "1.weight", "1.bias"), lambda: (R(B, 5),)),
    case("linear of a vector weight", lambda: Net(lambda s, x: F.linear(x, s.w), w=(5,)), lambda: (R(B, 3, 5),)),
    case("1x1", lambda: nn.Linear(1, 1), lambda: (R(B, 1),)),
    case("strided rows", lambda: Net(lambda s, x: s.l(x.mT)[:, ::2], l=nn.Linear(5, 3)), lambda: (R(B, 5, 6),)),
]  # fmt: skip


def _freeze(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


@matrix(LINEAR)
def test_linear(case, dtype):
    check(case, dtype)


def product(name, forward, inputs, tier="rule", **shapes):
    return case(name, lambda: Net(forward, **shapes), inputs, tier)


X2, X3, X4 = (lambda: (R(B, 5),)), (lambda: (R(B, 3, 5),)), (lambda: (R(B, 2, 3, 5),))
PRODUCTS = [
    product("x @ w", lambda s, x: x @ s.w, X2, w=(5, 4)),
    product("x3 @ w", lambda s, x: x @ s.w, X3, w=(5, 4)),
    product("x4 @ w", lambda s, x: x @ s.w, X4, w=(5, 4)),
    product("x3 @ square w", lambda s, x: x @ s.w @ s.w, X3, w=(5, 5)),
    product("x3 @ w.T", lambda s, x: x @ s.w.T, X3, w=(4, 5)),
    product("w @ x.T", lambda s, x: (s.w @ x.T).T, X2, w=(4, 5)),
    product("w @ x3.mT", lambda s, x: s.w @ x.mT, X3, w=(4, 5)),
    product("w @ x4", lambda s, x: s.w @ x, X4, w=(4, 3)),
    product("T==B: w @ x", lambda s, x: s.w @ x, lambda: (R(B, B, 5),), w=(B, B)),
    product("x @ vector", lambda s, x: x @ s.w, X2, w=(5,)),
    product("x3 @ vector", lambda s, x: torch.matmul(x, s.w), X3, w=(5,)),
    product("mm", lambda s, x: torch.mm(x, s.w), X2, w=(5, 4)),
    product("mm left", lambda s, x: torch.mm(s.w, x.t()).t(), X2, w=(4, 5)),
    product("mv", lambda s, x: torch.mv(x, s.w), X2, w=(5,)),
    product("bmm per head", lambda s, x: torch.bmm(x, s.w.expand(x.shape[0], -1, -1)), X3, "vmap", w=(5, 4)),
    product("matmul per head", lambda s, x: x @ s.w, X4, w=(2, 5, 4)),
    product("matmul per head left", lambda s, x: s.w @ x, X4, w=(2, 4, 3)),
    product("matmul broadcasts x", lambda s, x: x.unsqueeze(1) @ s.w, X3, w=(6, 5, 4)),
    product("addmm", lambda s, x: torch.addmm(s.b, x, s.w), X2, w=(5, 4), b=(4,)),
    product("addmm alpha beta", lambda s, x: torch.addmm(s.b, x, s.w, beta=0.3, alpha=2.0), X2, w=(5, 4), b=(4,)),
    product("addmm records first", lambda s, x: torch.addmm(x, x, s.w), X2, w=(5, 5)),
    product("addmm flattened", lambda s, x: torch.addmm(s.b, x.view(-1, 5), s.w).view(*x.shape[:2], 4), X3, w=(5, 4), b=(4,)),
    product("addmv", lambda s, x: torch.addmv(s.b, x, s.w), X2, w=(5,), b=(1,)),
    product("in-place addmm_", lambda s, x: (x @ s.v).addmm_(x, s.w), X2, "vmap", w=(5, 4), v=(5, 4)),
    product("baddbmm", lambda s, x: torch.baddbmm(s.b, x, s.w.expand(x.shape[0], -1, -1)), X3, "vmap", w=(5, 4), b=(1, 1, 4)),
    product("einsum right", lambda s, x: torch.einsum("btd,de->bte", x, s.w), X3, w=(5, 4)),
    product("einsum left", lambda s, x: torch.einsum("ed,btd->bte", s.w, x), X3, w=(4, 5)),
    product("einsum heads", lambda s, x: torch.einsum("btd,dhe->bthe", x, s.w), X3, w=(5, 2, 3)),
    product("einsum implicit", lambda s, x: torch.einsum("btd,d", x, s.w), X3, w=(5,)),
    product("einsum two weights", lambda s, x: torch.einsum("btd,de,e->bt", x, s.w, s.v), X3, w=(5, 4), v=(4,)),
    product("einsum ellipsis", lambda s, x: torch.einsum("...d,de->...e", x, s.w), X3, "vmap", w=(5, 4)),
    product("einsum records last", lambda s, x: torch.einsum("btd,de->etb", x, s.w).permute(2, 1, 0), X3, w=(5, 4)),
    product("einsum trace", lambda s, x: torch.einsum("bii,i->b", x, s.w), lambda: (R(B, 5, 5),), w=(5,)),
    product("einsum T==B", lambda s, x: torch.einsum("btd,ts->bsd", x, s.w), lambda: (R(B, B, 5),), w=(B, B)),
    product("tensordot", lambda s, x: torch.tensordot(x, s.w, 1), X3, "vmap", w=(5, 4)),
    product("inner", lambda s, x: torch.inner(x, s.w), X3, "vmap", w=(4, 5)),
    product("cdist", lambda s, x: torch.cdist(x, s.w), X2, "vmap", w=(4, 5)),
    product("two parameters meet", lambda s, x: x @ (s.w @ s.v), X3, w=(5, 4), v=(4, 5)),
    product("outer by broadcasting", lambda s, x: x.unsqueeze(-1) * s.w, X2, w=(4,)),
    product("bilinear form", lambda s, x: ((x @ s.w) * x).sum(-1), X3, w=(5, 5)),
]  # fmt: skip


@matrix(PRODUCTS)
def test_products(case, dtype):
    check(case, dtype)
