# ruff: noqa: E501  (tables of one-line models)
"""Embeddings and normalisation layers."""

import torch
from tests.oracle.oracle import B, Net, R, case, check, matrix
from torch import nn
from torch.nn import functional as F

ids = lambda *shape, high=6: torch.randint(0, high, shape)  # noqa: E731
repeated = lambda: (torch.tensor([[1, 1, 1], [0, 1, 0], [5, 5, 2], [2, 3, 4]]),)  # noqa: E731

EMBEDDING = [
    case("plain", lambda: nn.Embedding(6, 4), lambda: (ids(B, 3),)),
    case("rank 1", lambda: nn.Embedding(6, 4), lambda: (ids(B),)),
    case("rank 3", lambda: nn.Embedding(6, 4), lambda: (ids(B, 2, 3),)),
    case("repeated ids", lambda: nn.Embedding(6, 4), repeated),
    case("padding_idx", lambda: nn.Embedding(6, 4, padding_idx=1), repeated),
    case("negative padding_idx", lambda: nn.Embedding(6, 4, padding_idx=-1), repeated),
    case("functional negative padding_idx", lambda: Net(lambda s, i: F.embedding(i, s.w, padding_idx=-1), w=(6, 4)), repeated),
    case("sparse", lambda: nn.Embedding(6, 4, sparse=True), repeated),
    case("T==B", lambda: nn.Embedding(6, 4), lambda: (ids(B, B),)),
    case("int32 ids", lambda: nn.Embedding(6, 4), lambda: (ids(B, 3).int(),)),
    case("several", lambda: Net(lambda s, i, j: s.a(i) + s.b(j) * s.a(j), a=nn.Embedding(6, 4), b=nn.Embedding(6, 4)), lambda: (ids(B, 3), ids(B, 3))),
    case("positions by arange", lambda: Net(lambda s, i: s.e(i) + s.p(torch.arange(i.shape[1])), e=nn.Embedding(6, 4), p=nn.Embedding(9, 4)), lambda: (ids(B, 3),)),
    case("positions by arange, T==B", lambda: Net(lambda s, i: s.e(i) + s.p(torch.arange(i.shape[1])), e=nn.Embedding(6, 4), p=nn.Embedding(9, 4)), lambda: (ids(B, B),)),
    case("positions by arange, batched", lambda: Net(lambda s, i: s.e(i) + s.p(torch.arange(i.shape[1]).expand(i.shape[0], -1)), e=nn.Embedding(6, 4), p=nn.Embedding(9, 4)), lambda: (ids(B, B),)),
    case("positions from the mask", lambda: Net(lambda s, i: s.e(i) + s.p(i.ne(0).long().cumsum(1) * i.ne(0)), e=nn.Embedding(6, 4), p=nn.Embedding(9, 4)), lambda: (ids(B, 3),)),
    case("bare table indexed", lambda: Net(lambda s, i: s.w[i], w=(6, 4)), repeated),
    case("vector table indexed", lambda: Net(lambda s, i: s.w[i], w=(6,)), repeated, "vmap"),
    case("one_hot @ table", lambda: Net(lambda s, i: F.one_hot(i, 6).to(s.w.dtype) @ s.w, w=(6, 4)), repeated),
    case("table scaled", lambda: Net(lambda s, i: F.embedding(i, s.w * s.g), w=(6, 4), g=(4,)), repeated),
    case("tied to the head", lambda: Net(lambda s, i: s.l(s.e(i)) @ s.e.weight.T, e=nn.Embedding(6, 4), l=nn.Linear(4, 4)), repeated),
    case("tied to the head by linear", lambda: Net(lambda s, i: F.linear(torch.tanh(s.e(i)), s.e.weight), e=nn.Embedding(6, 4)), repeated),
    case("tied T==B", lambda: Net(lambda s, i: F.linear(torch.tanh(s.e(i)), s.e.weight), e=nn.Embedding(6, 4)), lambda: (ids(B, B),)),
    case("tied, wide vocabulary", lambda: Net(lambda s, i: F.linear(torch.tanh(s.e(i)), s.e.weight), e=nn.Embedding(60, 8)), lambda: (ids(B, 3, high=60),)),
    case("bag mean", lambda: nn.EmbeddingBag(6, 4), repeated, "vmap"),
    case("bag sum, padding", lambda: nn.EmbeddingBag(6, 4, mode="sum", padding_idx=1), repeated, "vmap"),
    case("bag max", lambda: nn.EmbeddingBag(6, 4, mode="max"), repeated, "vmap"),
    case("frozen embedding", lambda: nn.Sequential(nn.Embedding.from_pretrained(R(6, 4)), nn.Linear(4, 3)), repeated),
]  # fmt: skip


@matrix(EMBEDDING)
def test_embedding(case, dtype):
    check(case, dtype)


def pre(norm, *shape):
    """A trainable layer in front, so that the gradient passes through the norm too."""
    return lambda: nn.Sequential(nn.Linear(shape[-1], shape[-1]), norm(), nn.Tanh()), lambda: (R(shape),)


NORM = [
    case(name, *pre(norm, *shape))
    for name, norm, shape in [
        ("layer", lambda: nn.LayerNorm(6), (B, 6)),
        ("layer rank 3", lambda: nn.LayerNorm(6), (B, 3, 6)),
        ("layer two axes", lambda: nn.LayerNorm((3, 6)), (B, 2, 3, 6)),
        ("layer no affine", lambda: nn.LayerNorm(6, elementwise_affine=False), (B, 3, 6)),
        ("layer no bias", lambda: nn.LayerNorm(6, bias=False), (B, 3, 6)),
        ("layer T==B", lambda: nn.LayerNorm((B, 6)), (B, B, 6)),
        ("rms", lambda: nn.RMSNorm(6), (B, 3, 6)),
        ("rms no affine", lambda: nn.RMSNorm(6, elementwise_affine=False), (B, 3, 6)),
        ("group", lambda: nn.GroupNorm(2, 4), (B, 4, 6)),
        ("group 2d", lambda: nn.GroupNorm(2, 4), (B, 4, 3, 6)),
        ("group on vectors", lambda: nn.GroupNorm(2, 6), (B, 6)),
        ("group no affine", lambda: nn.GroupNorm(2, 4, affine=False), (B, 4, 6)),
        ("group C==B", lambda: nn.GroupNorm(2, B), (B, B, 6)),
        ("instance 1d", lambda: nn.InstanceNorm1d(4, affine=True), (B, 4, 6)),
        ("instance 2d", lambda: nn.InstanceNorm2d(4, affine=True), (B, 4, 3, 6)),
        ("instance 3d", lambda: nn.InstanceNorm3d(4, affine=True), (B, 4, 2, 3, 6)),
        ("instance no affine", lambda: nn.InstanceNorm2d(4), (B, 4, 3, 6)),
    ]
]
NORM += [
    case("batch norm in eval mode", lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)), lambda: (R(B, 4, 5),), train=False),
    case("batch norm in eval mode, no affine", lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)), lambda: (R(B, 4),), train=False),
    case("instance norm in eval mode with running stats", lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)), lambda: (R(B, 4, 5),), train=False),
    case("norm shared by two layers", lambda: Net(lambda s, x: s.n(s.b(s.n(s.a(x)))), a=nn.Linear(5, 5), b=nn.Linear(5, 5), n=nn.LayerNorm(5)), lambda: (R(B, 3, 5),)),
    case("by hand", lambda: Net(lambda s, x: s.g * (s.l(x) / s.l(x).pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()), l=nn.Linear(5, 5), g=(5,)), lambda: (R(B, 3, 5),)),
    case("functional, keywords", lambda: Net(lambda s, x: F.layer_norm(x, normalized_shape=(5,), weight=s.g, bias=s.b, eps=1e-3), g=(5,), b=(5,)), lambda: (R(B, 3, 5),)),
    case("adaptive layer norm", lambda: Net(lambda s, x, c: F.layer_norm(s.l(x), (5,)) * (1 + s.a(c)).unsqueeze(1), l=nn.Linear(5, 5), a=nn.Linear(2, 5)), lambda: (R(B, 3, 5), R(B, 2))),
    case("derived scale", lambda: Net(lambda s, x: F.layer_norm(x, (5,), 1 + s.g.tanh()), g=(5,)), lambda: (R(B, 3, 5),)),
]  # fmt: skip


@matrix(NORM)
def test_norm(case, dtype):
    check(case, dtype)
