# ruff: noqa: E501  (tables of one-line models)
"""Every layer of torch.nn that holds parameters or stands between them, in small networks."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from tests.oracle.oracle import B, Case, Net, R
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

attention = lambda **o: nn.MultiheadAttention(8, 2, **o)  # noqa: E731
PADDING = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()
OWNED = torch.tensor([[1, 2, 0, 0], [3, 3, 3, 1], [5, 0, 0, 0], [4, 6, 4, 0]])


def encoder(layers: int = 1, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def transformer(**options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what inference could do
        return nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, **options)


def over(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (R(B, *shape),)


def words() -> tuple[Tensor]:
    return (OWNED,)


def first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def chain(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def lin(*sizes: int, **o: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*sizes, **o)


def bag(mode: str, padding: int | None = None) -> Case:
    return Case(chain(lambda: nn.EmbeddingBag(7, 5, mode=mode, padding_idx=padding), nn.Tanh, lin(5, 3)), words)


class AddNorm(nn.Module):
    """x -> x + layer(norm(x)), of whatever layer."""

    def __init__(self, norm: nn.Module, layer: nn.Module):
        super().__init__()
        self.norm, self.layer = norm, layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


class Doubled(nn.Module):
    """A parametrization that anyone could write: symmetric matrices."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def parametrized(layer: nn.Module, how: Callable[..., Any], *args: Any, **o: Any) -> nn.Module:
    how(layer, *args, **o)
    return layer


def spectral(train: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 2)).train(train)

    return build


def conv_transpose(n: int, **o: Any) -> Case:
    layer = getattr(nn, f"ConvTranspose{n}d")
    return Case(lambda: nn.Sequential(layer(4, 6, 3, **o), nn.GELU(), layer(6, 2, 2)), over(4, *(4,) * n))


def instance(n: int) -> Case:
    conv, norm = getattr(nn, f"Conv{n}d"), getattr(nn, f"InstanceNorm{n}d")
    return Case(
        lambda: nn.Sequential(conv(2, 4, 3), norm(4, affine=True), nn.LeakyReLU(), conv(4, 2, 1)), over(2, *(5,) * n)
    )


LAYERS: dict[str, Case] = {
    "attention, weights returned": Case(lambda: Net(lambda s, x: s.a(x, x, x), a=attention(batch_first=True)), over(4, 8)),
    "attention, weights of each head": Case(lambda: Net(lambda s, x: s.a(x, x, x, average_attn_weights=False), a=attention(batch_first=True)), over(4, 8)),
    "attention (T, B, d), T == B == d / 2": Case(lambda: Net(lambda s, x: first(s.a(*[first(x)] * 3, need_weights=False)[0]), a=attention()), over(B, 8)),
    "attention, other widths": Case(lambda: Net(lambda s, x, y, z: s.a(x, y, z)[0], a=attention(batch_first=True, kdim=3, vdim=5)), lambda: (R(B, 4, 8), R(B, 6, 3), R(B, 6, 5))),
    "attention, learned and zero key": Case(lambda: Net(lambda s, x, m: s.a(x, x, x, key_padding_mask=m)[0], a=attention(batch_first=True, add_bias_kv=True, add_zero_attn=True)), lambda: (R(B, 4, 8), PADDING)),
    "attention, additive padding mask": Case(lambda: Net(lambda s, x, m: s.a(x, x, x, key_padding_mask=m, need_weights=False)[0], a=attention(batch_first=True)), lambda: (R(B, 4, 8), R(B, 4))),
    "attention, a mask for each head": Case(lambda: Net(lambda s, x, m: s.a(x, x, x, attn_mask=m.repeat_interleave(2, 0))[0], a=attention(batch_first=True)), lambda: (R(B, 4, 8), R(B, 4, 4))),
    "attention, learned bias as mask": Case(lambda: Net(lambda s, x: s.a(x, x, x, attn_mask=s.m)[0], a=attention(batch_first=True), m=(4, 4)), over(4, 8)),
    "attention, causal hint": Case(lambda: Net(lambda s, x: s.a(x, x, x, attn_mask=torch.ones(4, 4).triu(1).bool(), is_causal=True, need_weights=False)[0], a=attention(batch_first=True)), over(4, 8)),
    "encoder, padding": Case(lambda: Net(lambda s, x, m: s.e(x, src_key_padding_mask=m), e=encoder(2, batch_first=True)), lambda: (R(B, 4, 8), PADDING)),
    "encoder, causal, norm first": Case(lambda: Net(lambda s, x: s.e(x, mask=nn.Transformer.generate_square_subsequent_mask(4, dtype=x.dtype), is_causal=True), e=encoder(batch_first=True, norm_first=True)), over(4, 8)),
    "encoder (T, B, d)": Case(lambda: Net(lambda s, x: first(s.e(first(x))), e=encoder(activation="gelu")), over(4, 8)),
    "decoder, both masks": Case(lambda: Net(lambda s, x, y, m: s.d(x, y, tgt_mask=torch.ones(4, 4).triu(1).bool(), memory_key_padding_mask=m), d=nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 1)), lambda: (R(B, 4, 8), R(B, 4, 8), PADDING)),
    "whole Transformer": Case(lambda: Net(lambda s, x, y: s.t(x, y), t=transformer(batch_first=True)), lambda: (R(B, 4, 8), R(B, 3, 8))),
    "whole Transformer (T, B, d), norm first": Case(lambda: Net(lambda s, x, y: first(s.t(first(x), first(y))), t=transformer(norm_first=True)), lambda: (R(B, 4, 8), R(B, 4, 8))),
    "bag of words, sum": bag("sum"),
    "bag of words, mean with padding": bag("mean", 0),
    "bag of words, max with padding": bag("max", 0),
    "bag of words, weighted": Case(lambda: Net(lambda s, x, w: s.e(x, per_sample_weights=w), e=nn.EmbeddingBag(7, 5, mode="sum", padding_idx=0)), lambda: (OWNED, R(B, 4))),
    "bag of words, learned weights": Case(lambda: Net(lambda s, x: s.e(x, per_sample_weights=s.w[x]), e=nn.EmbeddingBag(7, 5, mode="sum"), w=(7,)), words),
    "bag of words, flat with offsets": Case(lambda: Net(lambda s, x: s.e(x.flatten(), torch.arange(0, x.numel(), 4)), e=nn.EmbeddingBag(7, 5, padding_idx=0)), words),
    "bilinear": Case(lambda: Net(lambda s, x, y: s.b(x, y), b=nn.Bilinear(4, 3, 2)), lambda: (R(B, 4), R(B, 3))),
    "bilinear of sequences": Case(lambda: Net(lambda s, x: s.b(s.l(x), x.flip(1)), b=nn.Bilinear(3, 4, 2), l=nn.Linear(4, 3)), over(5, 4)),
    "prelu, glu": Case(chain(lin(4, 6), nn.PReLU, lin(6, 6), nn.GLU, lambda: nn.PReLU(3)), over(4)),
    "transposed convolution 1d": conv_transpose(1, stride=2, padding=1, output_padding=1, groups=2),
    "transposed convolution 2d": conv_transpose(2, stride=(2, 1), dilation=2, bias=False),
    "transposed convolution 3d": conv_transpose(3, groups=2, padding=1),
    "instance norm 1d": instance(1),
    "instance norm 2d": instance(2),
    "instance norm 3d": instance(3),
    "group norm, rms norm": Case(chain(lambda: nn.Conv1d(2, 4, 2), lambda: nn.GroupNorm(2, 4), lambda: AddNorm(nn.RMSNorm(5), nn.Linear(5, 5))), over(2, 6)),
    "local response norm, softmax2d": Case(chain(lambda: nn.Conv2d(2, 4, 2), lambda: nn.LocalResponseNorm(2), nn.Softmax2d, lambda: nn.Conv2d(4, 2, 1)), over(2, 4, 4)),
    "fold and unfold": Case(lambda: Net(lambda s, x: F.fold(s.l(F.unfold(x, 2, stride=2).mT).mT, (4, 4), 2, stride=2), l=nn.Linear(8, 8)), over(2, 4, 4)),
    "pixel shuffle, upsample": Case(chain(lambda: nn.Conv2d(2, 4, 1), lambda: nn.PixelShuffle(2), lambda: nn.Upsample(scale_factor=2, mode="bilinear"), lambda: nn.Conv2d(1, 2, 2), lambda: nn.PixelUnshuffle(1)), over(2, 3, 3)),
    "channel shuffle, lazy pads": Case(chain(lambda: nn.ReflectionPad2d(1), lambda: nn.Conv2d(4, 4, 2), lambda: nn.ChannelShuffle(2), lambda: nn.CircularPad2d(1), lambda: nn.ReplicationPad2d(1), lambda: nn.Conv2d(4, 2, 2)), over(4, 3, 3)),
    "every pooling": Case(lambda: Net(lambda s, x: s.o(F.lp_pool2d(s.c(x), 2, 2) + F.adaptive_max_pool2d(s.c(x), 2) + F.avg_pool2d(s.c(x), 2) + F.max_pool2d(s.c(x), 2)), c=nn.Conv2d(2, 3, 2), o=nn.Conv2d(3, 2, 1)), over(2, 5, 5)),
    "max unpooling": Case(lambda: Net(lambda s, x: s.o((lambda y, i: F.max_unpool2d(y, i, 2))(*F.max_pool2d(s.c(x), 2, return_indices=True))), c=nn.Conv2d(2, 3, 2), o=nn.Conv2d(3, 2, 1)), over(2, 5, 5)),
    "cosine similarity of two": Case(lambda: Net(lambda s, x, y: F.cosine_similarity(s.l(x), s.l(y), dim=-1).unsqueeze(1), l=nn.Linear(4, 5)), lambda: (R(B, 4), R(B, 4))),
    "cosine similarity with prototypes": Case(lambda: Net(lambda s, x: F.cosine_similarity(s.l(x)[:, None], s.p, dim=-1), l=nn.Linear(4, 5), p=(3, 5)), over(4)),
    "pairwise distance": Case(lambda: Net(lambda s, x, y: F.pairwise_distance(s.l(x), s.l(y), keepdim=True) + F.pairwise_distance(s.l(x), s.p, keepdim=True), l=nn.Linear(4, 5), p=(5,)), lambda: (R(B, 4), R(B, 4))),
    "weight norm": Case(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Unflatten(1, (1, 5)), parametrizations.weight_norm(nn.Conv1d(1, 2, 3))), over(6)),
    "spectral norm, iterating": Case(spectral(True), over(6), same_forward=False),
    "spectral norm, fixed": Case(spectral(False), over(6), train=False),
    "orthogonal": Case(lambda: parametrizations.orthogonal(nn.Linear(5, 5)), over(5)),
    "orthogonal, Cayley": Case(lambda: nn.Sequential(nn.Linear(5, 5), parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="cayley")), over(5)),
    "own parametrization": Case(lambda: nn.Sequential(parametrized(nn.Linear(5, 5), parametrize.register_parametrization, "weight", Doubled()), nn.Tanh(), parametrized(nn.Linear(5, 2), parametrize.register_parametrization, "bias", Positive())), over(3, 5)),
}  # fmt: skip
