# ruff: noqa: E501  (tables of one-line models)
"""Everything that people do to parameters, control flow, inputs and outputs; generative models."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tests.matrix.plain_layers import chain, lin, over
from tests.oracle.oracle import B, Case, Net, R, per_record
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class HyperNetwork(nn.Module):
    """Weights computed from an embedding of the layer, by parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.make = (
            nn.Parameter(torch.randn(2, 3)),
            nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 20)),
        )

    def forward(self, x: Tensor) -> Tensor:
        for k in range(2):
            weights = self.make(self.code[k])
            x = torch.tanh(F.linear(x, weights[:16].view(4, 4), weights[16:]))
        return x


class Conditioned(nn.Module):
    """A hypernetwork that gives every record weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.out = nn.Linear(3, 12), nn.Linear(3, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.out(torch.tanh(torch.bmm(x.unsqueeze(1), self.make(condition).view(-1, 4, 3)).squeeze(1)))


class Film(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.film, self.norm = nn.Conv2d(2, 4, 3), nn.Linear(3, 8), nn.GroupNorm(2, 4, affine=False)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        gain, shift = self.film(text)[:, :, None, None].chunk(2, dim=1)
        return F.relu(self.norm(self.conv(image)) * (1 + gain) + shift)


class Lora(nn.Module):
    """W + B @ A with W frozen, and the same by two products."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 5).requires_grad_(False)
        self.a, self.b, self.out = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(5, 2)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        merged = F.linear(x, self.base.weight + self.b @ self.a * 0.5, self.base.bias)
        return self.out(merged + F.linear(F.linear(x, self.a), self.b))


class FakeQuant(nn.Module):
    """Weights and activations rounded, with a learned step and the gradient passed straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.step = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.2))

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        return x + (torch.round(x) - x).detach()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.rounded((self.layer.weight / self.step).clamp(-8, 7)) * self.step
        return F.linear(self.rounded(x / self.step) * self.step, weight, self.layer.bias)


class Swish(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return grad * gate * (1 + x * (1 - gate))


class EarlyExit(nn.Module):
    """Records that are sure leave early: by a mask for each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.exits = nn.ModuleList([nn.Linear(4, 3) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        out, left = x.new_zeros(x.shape[0], 3), x.new_zeros(x.shape[0], 1).bool()
        for block, leave in zip(self.blocks, self.exits, strict=True):
            x = torch.tanh(block(x))
            answer = leave(x)
            sure = answer.softmax(-1).amax(-1, keepdim=True) > 0.5
            out = torch.where(sure & ~left, answer, out)
            left = left | sure
        return torch.where(left, out, answer)


class Experts(nn.Module):
    """All experts see all tokens; ``top`` of them count."""

    def __init__(self, top: int | None) -> None:
        super().__init__()
        self.top, self.gate = top, nn.Linear(4, 3)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        if self.top is not None:
            best = gates.topk(self.top, dim=-1)
            gates = torch.zeros_like(gates).scatter(-1, best.indices, best.values)
        return torch.stack([gates[..., k, None] * e(x) for k, e in enumerate(self.experts)]).sum(0)


class Vae(nn.Module):
    """The noise of each record is an input, so that both sides see the same."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6), nn.Sequential(nn.Linear(3, 5), nn.ELU(), nn.Linear(5, 6))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = self.encode(x).chunk(2, -1)
        z = mu + torch.exp(0.5 * log_var) * noise
        return self.decode(z), -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum(-1)


class Coupling(nn.Module):
    """An affine coupling layer of a flow, with an invertible mixing by parts (Glow)."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.mix = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x @ self.mix.T
        fixed, moved = x.split(2, dim=-1)
        scale, shift = self.net(fixed).chunk(2, -1)
        scale = torch.tanh(scale)
        log_det = scale.sum(-1) + torch.linalg.slogdet(self.mix)[1]
        return torch.cat([fixed, moved * scale.exp() + shift], -1), log_det


class Prototypes(nn.Module):
    """Distances from learned prototypes, of records and of the tokens in them."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.points = nn.Linear(4, 3), nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        return -torch.cdist(h, self.points).pow(2).mean(1) - torch.cdist(h.mean(1), self.points)


class Mixture(nn.Module):
    """A mixture density network that returns its own negative log-likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 9)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight, mean, log_scale = self.net(x).chunk(3, -1)
        each = torch.distributions.Normal(mean, log_scale.exp(), validate_args=False).log_prob(y)
        return -torch.logsumexp(weight.log_softmax(-1) + each, -1)


class Monarch(nn.Module):
    """Block-diagonal products with a transposition between them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(2, 3, 3)), nn.Parameter(torch.randn(3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = torch.bmm(x.view(n, 2, 3).transpose(0, 1), self.left).transpose(0, 1)
        x = torch.bmm(x.permute(2, 0, 1), self.right).permute(1, 2, 0)
        return x.reshape(n, 6)


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]


class Named(NamedTuple):
    logits: Tensor
    aux: dict[str, Tensor]


def euler(s: Any, x: Tensor) -> Tensor:
    for k in range(4):
        time = torch.full_like(x[..., :1], k / 4)
        x = x + 0.25 * s.f(torch.cat([x, time], -1))
    return x


def random_depth(s: Any, x: Tensor) -> Tensor:
    draw = random.Random(3)
    for layer in s.layers:
        if draw.random() < 0.5:
            x = x + torch.tanh(layer(x))
    return s.out(x)


def tensor_train(s: Any, x: Tensor) -> Tensor:
    return torch.einsum("nabc,apx,xbqy,ycr->npqr", x.view(-1, 2, 2, 3), s.a, s.b, s.c).flatten(1)


def batch_if(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    return s.b(h) if bool(h.detach().isfinite().all()) else s.c(h)


def energy(s: Any, x: Tensor) -> Tensor:
    return -(x * s.v).sum(-1) - F.softplus(F.linear(x, s.w, s.h)).sum(-1)


def named(out: Any) -> Tensor:
    return per_record([out.logits, *(out.hidden if isinstance(out, Output) else out.aux.values())])


def body(forward: Callable[..., Any], /, **members: Any) -> Callable[[], nn.Module]:
    return lambda: Net(
        forward, **{k: v() if callable(v) and not isinstance(v, nn.Module) else v for k, v in members.items()}
    )


TRICKS: dict[str, Case] = {
    "hypernetwork of parameters": Case(HyperNetwork, over(4)),
    "hypernetwork of records": Case(Conditioned, lambda: (R(B, 4), R(B, 3))),
    "FiLM": Case(Film, lambda: (R(B, 2, 4, 4), R(B, 3))),
    "Siamese": Case(body(lambda s, x, y: torch.stack([(s.e(x) - s.e(y)).abs().sum(-1), F.cosine_similarity(s.e(x), s.e(y))], 1), e=chain(lin(4, 5), nn.Tanh, lin(5, 3))), lambda: (R(B, 4), R(B, 4))),
    "tied autoencoder": Case(body(lambda s, x: F.linear(torch.sigmoid(F.linear(x, s.w, s.b)), s.w.T, s.c), w=(3, 5), b=(3,), c=(5,)), over(5)),
    "LoRA by hand": Case(Lora, over(3, 5)),
    "fake quantisation": Case(FakeQuant, over(4)),
    "custom Function": Case(body(lambda s, x: s.b(Swish.apply(s.a(x))), a=lin(4, 5), b=lin(5, 2)), over(3, 4)),
    "early exit by masks": Case(EarlyExit, over(4)),
    "branch taken by all": Case(body(batch_if, a=lin(4, 4), b=lin(4, 2), c=lin(4, 2)), over(4)),
    "soft experts": Case(lambda: Experts(None), over(3, 4)),
    "hard experts, top 1 by mask": Case(lambda: Experts(1), over(3, 4)),
    "hard experts, top 2 by mask": Case(lambda: Experts(2), over(3, 4)),
    "random depth": Case(body(random_depth, layers=lambda: nn.ModuleList([nn.Linear(4, 4) for _ in range(4)]), out=lin(4, 2)), over(4)),
    "a layer nobody uses": Case(body(lambda s, x: s.a(x), a=lin(4, 2), unused=lin(3, 3)), over(4)),
    "ModuleDict by a constant": Case(body(lambda s, x, to: s.m[to](x), m=lambda: nn.ModuleDict({"left": nn.Linear(4, 2), "right": nn.Linear(4, 2)})), lambda: {"x": R(B, 4), "to": "right"}),
    "neural ODE by Euler": Case(body(euler, f=chain(lin(4, 6), nn.Tanh, lin(6, 3))), over(3)),
    "checkpointed attention": Case(body(lambda s, x: checkpoint(s.e, s.l(x), use_reentrant=False), l=lin(4, 8), e=lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)), over(3, 4)),
    "checkpointed convolution": Case(body(lambda s, x: s.o(checkpoint(s.c, x, use_reentrant=False).flatten(1)), c=chain(lambda: nn.Conv1d(2, 4, 3), lambda: nn.GroupNorm(2, 4), nn.ReLU), o=lin(16, 2)), over(2, 6)),
    "variational autoencoder": Case(Vae, lambda: (R(B, 6), R(B, 3))),
    "flow, coupling": Case(Coupling, over(4)),
    "energy of an RBM": Case(body(energy, v=(4,), w=(3, 4), h=(3,)), over(4)),
    "prototypes": Case(Prototypes, over(5, 4)),
    "prototypes, as many as records": Case(body(lambda s, x: torch.cdist(s.p, s.l(x)).T, l=lin(4, 3), p=(B, 3)), over(4)),
    "mixture density": Case(Mixture, lambda: (R(B, 3), R(B, 1))),
    "tensor train": Case(body(tensor_train, a=(2, 3, 2), b=(2, 2, 2, 2), c=(2, 3, 2)), over(12)),
    "Monarch": Case(Monarch, over(6)),
    "einsum with dots": Case(body(lambda s, x: torch.einsum("...i,oi->...o", x, s.w) + torch.einsum("...i,...i->...", x, s.v).unsqueeze(-1), w=(3, 4), v=(4,)), over(2, 3, 4)),
    "temperature": Case(body(lambda s, x: F.normalize(s.l(x), dim=-1) @ F.normalize(s.p, dim=-1).T * s.t.exp(), l=lin(4, 3), p=(5, 3), t=()), over(4)),
    "dict batch": Case(body(lambda s, batch: s.a(batch["x"]) + s.b(batch["y"]["z"]), a=lin(4, 2), b=lin(3, 2)), lambda: ({"x": R(B, 4), "y": {"z": R(B, 3)}},)),
    "keyword-only": Case(body(lambda s, *, x, scale=2.0: s.a(x) * scale, a=lin(4, 2)), lambda: {"x": R(B, 4)}),
    "dataclass out": Case(body(lambda s, x: Output(s.b(s.a(x)), [s.a(x)]), a=lin(4, 3), b=lin(3, 2)), over(4), loss=named, same_forward=False),
    "named tuple out": Case(body(lambda s, x: Named(s.b(s.a(x)), {"h": s.a(x)}), a=lin(4, 3), b=lin(3, 2)), over(4), loss=named, same_forward=False),
    "nested containers": Case(lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Identity())), nn.Sequential(nn.Sequential(nn.Linear(4, 2)))), over(3, 4)),
    "sequence first": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), lambda: (R(5, B, 3),), batch_dim=1, loss=lambda o: per_record(o.transpose(0, 1))),
    "sequence first, as many steps as records": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), lambda: (R(B, B, 3),), batch_dim=1, loss=lambda o: per_record(o.transpose(0, 1))),
    "gaussian kernel, whitened": Case(body(lambda s, x: torch.exp(-0.5 * torch.linalg.solve_triangular(s.c.tril() + 3 * torch.eye(3, dtype=x.dtype), s.l(x).unsqueeze(-1), upper=False).square().sum((1, 2))).unsqueeze(1), l=lin(4, 3), c=(3, 3)), over(4)),
    "matrix exponential": Case(body(lambda s, x: s.l(x) @ torch.linalg.matrix_exp(s.a - s.a.T), l=lin(4, 3), a=(3, 3)), over(4)),
    "covariance pooling": Case(body(lambda s, x: s.o((s.l(x).mT @ s.l(x) / x.shape[1] + torch.eye(3, dtype=x.dtype)).logdet().unsqueeze(1)), l=lin(4, 3), o=lin(1, 2)), over(5, 4)),
    "sorted and quantised": Case(body(lambda s, x: s.o(torch.cat([s.l(x).sort(-1).values, s.l(x).quantile(0.5, dim=-1, keepdim=True), s.l(x).diff(dim=-1)], -1)), l=lin(4, 3), o=lin(6, 2)), over(4)),
    "binned": Case(body(lambda s, x: s.e(torch.bucketize(x, torch.linspace(-1, 1, 4, dtype=x.dtype))).flatten(1), e=lambda: nn.Embedding(5, 3)), over(3)),
    "spherical, by atan2": Case(body(lambda s, x: s.o(torch.stack([torch.atan2(s.l(x)[:, 0], s.l(x)[:, 1]), torch.linalg.vector_norm(s.l(x), dim=-1)], -1)), l=lin(4, 3), o=lin(2, 2)), over(4)),
    "cross products": Case(body(lambda s, x: torch.linalg.cross(s.l(x), s.v.expand_as(s.l(x))), l=lin(4, 3), v=(3,)), over(4)),
    "complex weights of a linear map": Case(body(lambda s, x: F.linear(x * 1j, torch.view_as_complex(s.w)).abs(), w=(4, 3, 2)), over(5, 3)),
    "complex weights, adjoint": Case(body(lambda s, x: torch.view_as_real(torch.complex(x, s.l(x)) @ torch.view_as_complex(s.w).mH), w=(2, 3, 2), l=lin(3, 3)), over(5, 3)),
    "complex gains": Case(body(lambda s, x: (x * torch.view_as_complex(s.w)).abs(), w=(3, 2)), over(B, 3)),
    "joined by hstack": Case(body(lambda s, x: s.o(torch.hstack([s.l(x), x])), l=lin(4, 3), o=lin(7, 2)), over(4)),
    "sinusoid of a scalar time": Case(body(lambda s, t: s.l(torch.cat([(t[:, None] * f).sin() for f in (1.0, math.e)], 1)), l=lin(2, 2)), lambda: (R(B),)),
}  # fmt: skip
