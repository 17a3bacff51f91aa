# ruff: noqa: E501  (tables of one-line models)
"""Convolutions and transposed convolutions of one to three dimensions, in every option."""

import pytest
import torch
from tests.oracle.oracle import B, Net, R, case, check, matrix
from torch import nn
from torch.nn import functional as F

SIDES = {1: (9,), 2: (7, 8), 3: (4, 5, 4)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def conv(n, name, sides=None, channels=(4, 6), layer=CONV, **options):
    return case(
        f"{n}d-{name}",
        lambda: nn.Sequential(layer[n](*channels, **{"kernel_size": 3, **options}), nn.Tanh()),
        lambda: (R(B, channels[0], *(sides or SIDES[n])),),
    )


PLAIN = [
    conv(n, name, **options)
    for n in (1, 2, 3)
    for name, options in {
        "plain": {},
        "no bias": {"bias": False},
        "stride": {"stride": 2},
        "padding": {"padding": 1},
        "groups": {"groups": 2, "padding": 1},
        "depthwise": {"groups": 4, "channels": (4, 8), "padding": 1},
        "dilation": {"dilation": 2, "padding": 2},
        "all": {"groups": 2, "dilation": 2, "stride": 2, "padding": 3},
        "kernel 1": {"kernel_size": 1},
        "kernel 2 stride 2": {"kernel_size": 2, "stride": 2},
        "same": {"padding": "same"},
        "same even": {"padding": "same", "kernel_size": 2},
        "same dilated": {"padding": "same", "dilation": 2, "kernel_size": 2},
        "valid": {"padding": "valid", "stride": 2},
        "reflect": {"padding": 1, "padding_mode": "reflect"},
        "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
        "circular": {"padding": 1, "padding_mode": "circular", "groups": 2},
        "circular same": {"padding": "same", "padding_mode": "circular", "kernel_size": 2},
        "stride leaves a rest": {"stride": 3, "kernel_size": 2},
    }.items()
]
PLAIN += [
    conv(2, "anisotropic", kernel_size=(3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    conv(2, "many flops", sides=(24, 24), channels=(16, 32), padding=1),
    case("2d-T==B square", lambda: nn.Conv2d(B, B, 3, padding=1), lambda: (R(B, B, B, B),)),
    case("2d-channels last", lambda: nn.Conv2d(4, 6, 3), lambda: (R(B, 4, 6, 6).contiguous(memory_format=torch.channels_last),)),
    case("2d-expanded input", lambda: Net(lambda s, x: s.c(x.expand(-1, 4, -1, -1)), c=nn.Conv2d(4, 6, 3)), lambda: (R(B, 1, 6, 6),)),
    case("2d-folded frames", lambda: Net(lambda s, x: s.c(x.flatten(0, 1)).unflatten(0, x.shape[:2]), c=nn.Conv2d(2, 3, 3)), lambda: (R(B, 3, 2, 5, 5),)),
    case("1d-reused", lambda: Net(lambda s, x: s.c(torch.tanh(s.c(x))), c=nn.Conv1d(3, 3, 3, padding=1)), lambda: (R(B, 3, 6),)),
    case("2d-tied sizes", lambda: Net(lambda s, x: s.c(x).flatten(1).sum(1) + s.c(F.avg_pool2d(x, 2)).flatten(1).sum(1), c=nn.Conv2d(2, 3, 2)), lambda: (R(B, 2, 6, 6),)),
    case("2d-tied to its transpose", lambda: Net(lambda s, x: F.conv_transpose2d(torch.tanh(F.conv2d(x, s.w)), s.w), w=(3, 2, 2, 2)), lambda: (R(B, 2, 5, 5),)),
    case("2d-derived kernel", lambda: Net(lambda s, x: F.conv2d(x, s.w * s.g, s.b), w=(3, 2, 3, 3), g=(3, 1, 1, 1), b=(3,)), lambda: (R(B, 2, 5, 5),)),
    case("2d-kernel and its norm", lambda: Net(lambda s, x: F.conv2d(x, s.w) * s.w.norm(), w=(3, 2, 3, 3)), lambda: (R(B, 2, 5, 5),)),
    case("2d-weight standardisation", lambda: Net(lambda s, x: F.conv2d(x, (s.w - s.w.mean((1, 2, 3), True)) / s.w.std((1, 2, 3), keepdim=True)), w=(3, 2, 3, 3)), lambda: (R(B, 2, 5, 5),)),
    case("2d-functional", lambda: Net(lambda s, x: F.conv2d(x, s.w, None, 2, 1, 1, 2), w=(4, 2, 3, 3)), lambda: (R(B, 4, 6, 6),)),
    case("2d-keywords", lambda: Net(lambda s, x: F.conv2d(input=x, weight=s.w, bias=s.b, padding="same"), w=(3, 4, 3, 3), b=(3,)), lambda: (R(B, 4, 6, 6),)),
    case("2d-resnet block", lambda: Net(lambda s, x: s.d(x) + s.b(F.relu(s.n(s.a(x)), inplace=True)), a=nn.Conv2d(2, 4, 3, 2, 1), n=nn.GroupNorm(2, 4), b=nn.Conv2d(4, 4, 3, 1, 1), d=nn.Conv2d(2, 4, 1, 2)), lambda: (R(B, 2, 6, 6),)),
    case("2d-one record", lambda: nn.Conv2d(2, 3, 3), lambda: (R(1, 2, 6, 6),)),
]  # fmt: skip


@matrix(PLAIN)
def test_conv(case, dtype):
    check(case, dtype)


TRANSPOSE = [
    conv(n, name, layer=TRANSPOSED, **options)
    for n in (1, 2, 3)
    for name, options in {
        "plain": {},
        "no bias": {"bias": False},
        "stride": {"stride": 2, "padding": 1},
        "output padding": {"stride": 3, "output_padding": 2},
        "groups": {"groups": 2},
        "dilation": {"dilation": 2},
        "all": {"stride": 2, "output_padding": 1, "groups": 2, "dilation": 2, "padding": 1},
    }.items()
]


@matrix(TRANSPOSE)
def test_transposed(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_unbatched_image_is_not_taken_for_records(n):
    """A model that strips the batch axis itself convolves one image: exact on a lower tier, or refused."""
    model = Net(lambda s, x: s.c(x.squeeze(1)), c=CONV[n](B, 2, 2))
    with pytest.raises((RuntimeError, Exception)):
        check(case("", lambda: model, lambda: (R(B, 1, *SIDES[n]),)).values[0], torch.float64)
