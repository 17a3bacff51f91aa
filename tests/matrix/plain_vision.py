# ruff: noqa: E501  (tables of one-line models)
"""Networks for images and functions of space, written by hand in plain torch."""

import math
from collections.abc import Callable

import torch
from tests.matrix.plain_layers import AddNorm, chain, lin, over
from tests.oracle.oracle import B, Case, Net, R
from torch import Tensor, nn
from torch.nn import functional as F


def conv(i: int, o: int, k: int = 3, **more: int) -> nn.Module:
    """Convolution, normalisation and activation."""
    more.setdefault("padding", k // 2)
    return nn.Sequential(nn.Conv2d(i, o, k, **more), nn.GroupNorm(1, o), nn.SiLU())


class Siren(nn.Module):
    """A field over the coordinates of each record, in sines."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 8), nn.Linear(8, 8)])
        self.out, self.omega = nn.Linear(8, 3), nn.Parameter(torch.tensor(3.0))

    def forward(self, xy: Tensor) -> Tensor:
        for layer in self.layers:
            xy = torch.sin(self.omega * layer(xy))
        return self.out(xy)


class Mixer(nn.Module):
    def __init__(self, patches: int = 4, width: int = 6) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, stride=2)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.tokens = nn.Sequential(nn.Linear(patches, 8), nn.GELU(), nn.Linear(8, patches))
        self.channels = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.head(x.mean(dim=1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv(1, 4), conv(4, 6), conv(6, 6)
        self.up, self.join = nn.ConvTranspose2d(6, 4, 2, stride=2), conv(8, 4)
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down1(x)
        low = self.middle(self.down2(F.max_pool2d(high, 2)))
        return self.out(self.join(torch.cat((high, self.up(low)), dim=1)))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(2 + 3 * k, 3) for k in range(3)])
        self.head = nn.Linear(11, 2)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return self.head(F.adaptive_avg_pool2d(torch.cat(seen, 1), 1)[..., 0, 0])


class Inverted(nn.Module):
    """MobileNet's block with squeeze and excitation."""

    def __init__(self, width: int = 4, wide: int = 8) -> None:
        super().__init__()
        self.expand, self.depthwise = conv(width, wide, 1), conv(wide, wide, 3, groups=wide)
        self.squeeze, self.excite = nn.Conv2d(wide, 2, 1), nn.Conv2d(2, wide, 1)
        self.project = nn.Conv2d(wide, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(self.expand(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3), keepdim=True)))))
        return x + self.project(h * gate)


class HandViT(nn.Module):
    """Class token, positions and every weight bare."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        p = lambda *s: nn.Parameter(torch.randn(s) / math.sqrt(s[-1]))  # noqa: E731
        self.heads, self.patch, self.token, self.place = heads, p(12, width), p(1, 1, width), p(1, 5, width)
        self.qkv, self.out, self.up, self.down = p(width, 3 * width), p(width, width), p(width, 12), p(12, width)
        self.gain, self.shift, self.scale, self.head = p(2, width), p(2, width), p(width), p(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(n, 4, 12) @ self.patch
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.place
        h = F.layer_norm(x, x.shape[-1:], self.gain[0], self.shift[0])
        q, k, v = (h @ self.qkv).view(n, 5, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        x = x + mixed.transpose(1, 2).reshape(n, 5, -1) @ self.out * self.scale
        h = F.layer_norm(x, x.shape[-1:], self.gain[1], self.shift[1])
        x = x + F.gelu(h @ self.up) @ self.down
        return x[:, 0] @ self.head


class WindowBias(nn.Module):
    """Swin's attention: windows folded into the batch, a table of relative positions as a bias."""

    def __init__(self, width: int = 8, heads: int = 2, window: int = 2) -> None:
        super().__init__()
        self.w, self.heads = window, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None, :]) + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        n, side, _, d = x.shape
        w, m = self.w, side // self.w
        x = torch.roll(x, (-1, -1), (1, 2))
        cut = x.view(n, m, w, m, w, d).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, d)
        q, k, v = self.qkv(cut).reshape(-1, w * w, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(w * w, w * w, self.heads).permute(2, 0, 1).contiguous()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))
        cut = self.out(mixed.transpose(1, 2).reshape(-1, w * w, d))
        back = cut.view(n, m, m, w, w, d).permute(0, 1, 3, 2, 4, 5).reshape(n, side, side, d)
        return torch.roll(back, (1, 1), (1, 2))


class Deformed(nn.Module):
    """A spatial transformer: where to look is predicted, then sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.features, self.out = nn.Linear(32, 6), nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.where(x.flatten(1)).view(-1, 2, 3) * 0.1 + torch.eye(2, 3, dtype=x.dtype)
        grid = F.affine_grid(theta, [x.shape[0], 4, 4, 4], align_corners=False)
        return self.out(F.grid_sample(self.features(x), grid, align_corners=False))


class LearnedPlane(nn.Module):
    """A learned feature plane, read at the points of each record (tri-plane fields, hash-free)."""

    def __init__(self) -> None:
        super().__init__()
        self.plane, self.out = nn.Parameter(torch.randn(1, 4, 5, 5)), nn.Linear(4, 2)

    def forward(self, xy: Tensor) -> Tensor:
        grid = torch.tanh(xy).unsqueeze(1)
        found = F.grid_sample(self.plane.expand(len(xy), -1, -1, -1), grid, align_corners=True)
        return self.out(found[:, :, 0].transpose(1, 2))


class Capsules(nn.Module):
    """Routing by agreement; the couplings are not trained through."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.primary = nn.Parameter(torch.randn(1, 5, 3, 4, 2) * 0.3), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        u = self.primary(x).view(x.size(0), 5, 1, 1, 2)
        votes = (self.weight * u).sum(-1)
        logits = torch.zeros(x.size(0), 5, 3, dtype=x.dtype, device=x.device)
        for _ in range(3):
            s = (F.softmax(logits, dim=2).unsqueeze(-1) * votes).sum(dim=1)
            size = s.pow(2).sum(-1, keepdim=True)
            v = s * size / (1 + size) / (size + 1e-8).sqrt()
            logits = logits + (votes.detach() * v.detach().unsqueeze(1)).sum(-1)
        return v


class Spectral(nn.Module):
    """Fourier neural operator: complex weights held as pairs of real ones."""

    def __init__(self, width: int = 4, modes: int = 3) -> None:
        super().__init__()
        self.modes, self.lift, self.skip = modes, nn.Conv1d(1, width, 1), nn.Conv1d(width, width, 1)
        self.weight, self.out = nn.Parameter(torch.randn(width, width, modes, 2) * 0.3), nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        low = torch.fft.rfft(x, norm="ortho")[..., : self.modes]
        mixed = torch.einsum("bim,iom->bom", low, torch.view_as_complex(self.weight))
        full = F.pad(mixed, (0, x.shape[-1] // 2 + 1 - self.modes))
        return self.out(F.gelu(torch.fft.irfft(full, n=x.shape[-1], norm="ortho") + self.skip(x)))


class Filtered(nn.Module):
    """GFNet: a product with a learned filter among the frequencies of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.randn(2, 4, 3, 2)), nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, dim=(2, 3), norm="ortho") * torch.view_as_complex(self.filter)
        return self.out(torch.fft.irfft2(spectrum, s=(4, 4), dim=(2, 3), norm="ortho"))


class Splines(nn.Module):
    """A layer of a Kolmogorov-Arnold network: a B-spline for each edge."""

    def __init__(self, i: int, o: int, knots: int = 5, order: int = 2) -> None:
        super().__init__()
        self.order = order
        self.register_buffer("grid", torch.arange(-order, knots + order + 1) * (2.0 / knots) - 1)
        self.base, self.spline = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.randn(o, i, knots + order))

    def forward(self, x: Tensor) -> Tensor:
        y = x.unsqueeze(-1)
        bases = ((y >= self.grid[:-1]) & (y < self.grid[1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (y - self.grid[: -(k + 1)]) / (self.grid[k:-1] - self.grid[: -(k + 1)])
            right = (self.grid[k + 1 :] - y) / (self.grid[k + 1 :] - self.grid[1:-k])
            bases = left * bases[..., :-1] + right * bases[..., 1:]
        return F.linear(F.silu(x), self.base) + F.linear(bases.flatten(-2), self.spline.flatten(1))


def features(kind: str) -> Callable[..., Tensor]:
    """Fixed or learned features of a scalar."""
    bessel = lambda s, x: torch.special.bessel_j0(x.unsqueeze(-1) * s.f.detach()) * s.f  # noqa: E731
    fourier = lambda s, x: torch.cat([torch.sin(x.unsqueeze(-1) * s.f), torch.cos(x.unsqueeze(-1) * s.f)], -1)  # noqa: E731
    return {"bessel": bessel, "fourier": fourier}[kind]


VISION: dict[str, Case] = {
    "SIREN, a field of each record": Case(Siren, over(5, 2)),
    "MLP-Mixer": Case(Mixer, over(3, 4, 4)),
    "U-Net": Case(UNet, over(1, 4, 4)),
    "DenseNet block": Case(DenseBlock, over(2, 4, 4)),
    "inverted residual, squeeze and excite": Case(lambda: nn.Sequential(conv(2, 4, stride=2), Inverted(), Inverted(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), over(2, 6, 6)),
    "depthwise separable": Case(chain(lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), lambda: nn.Conv2d(8, 3, 1), nn.ReLU6, nn.Flatten, lin(12, 2)), over(4, 4, 4)),
    "ConvNeXt block, layer scale": Case(lambda: Net(lambda s, x: x + s.g * s.m(s.d(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), g=(4, 1, 1), d=nn.Conv2d(4, 4, 3, padding=1, groups=4), m=nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))), over(4, 4, 4)),
    "ViT of bare parameters": Case(HandViT, over(3, 4, 4)),
    "windows with a relative position table": Case(WindowBias, over(4, 4, 8)),
    "windows, as many as records": Case(WindowBias, lambda: (R(B, 4, 4, 8),)),
    "spatial transformer": Case(Deformed, over(2, 4, 4)),
    "learned plane, sampled": Case(LearnedPlane, over(6, 2)),
    "capsules, routed": Case(Capsules, over(6)),
    "Fourier neural operator": Case(Spectral, over(1, 8)),
    "filter in the frequencies": Case(Filtered, over(2, 4, 4)),
    "KAN of splines": Case(lambda: nn.Sequential(Splines(3, 4), Splines(4, 2)), over(3)),
    "Fourier features, learned": Case(lambda: Net(lambda s, x: s.l(features("fourier")(s, x)), f=(3,), l=nn.Linear(6, 2)), over(2)),
    "Bessel features": Case(lambda: Net(lambda s, x: s.l(features("bessel")(s, x)), f=(3,), l=nn.Linear(3, 2)), over(2)),
    "residual of any norm": Case(lambda: nn.Sequential(AddNorm(nn.LayerNorm(4), nn.Linear(4, 4)), AddNorm(nn.RMSNorm(4), nn.Linear(4, 4))), over(3, 4)),
    "3-D convolution, video": Case(chain(lambda: nn.Conv3d(2, 4, 2), lambda: nn.GroupNorm(2, 4), nn.ReLU, lambda: nn.AdaptiveAvgPool3d(1), nn.Flatten, lin(4, 2)), over(2, 3, 4, 4)),
}  # fmt: skip
