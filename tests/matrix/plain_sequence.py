# ruff: noqa: E501  (tables of one-line models)
"""Sequences, sets and graphs, written by hand in plain torch."""

import math
from typing import Any

import torch
from tests.matrix.plain_layers import OWNED, PADDING, over
from tests.oracle.oracle import B, Case, Net, R, per_record
from torch import Tensor, nn
from torch.nn import functional as F

V, T, D, H = 11, 5, 8, 2
ids = lambda *s: lambda: (torch.randint(0, V, (B, *(s or (T,)))),)  # noqa: E731
adjacency = lambda: ((R(B, 4, 4) > 0).float(),)  # noqa: E731
LENGTHS = torch.tensor([4, 1, 3, 2])


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residuals and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.out = nn.Conv1d(1, 4, 1), nn.Conv1d(4, 2, 1)
        self.gates = nn.ModuleList([nn.Conv1d(4, 8, 2, dilation=2**k) for k in range(2)])
        self.mixes = nn.ModuleList([nn.Conv1d(4, 4, 1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.start(x), 0
        for k, (gate, mix) in enumerate(zip(self.gates, self.mixes, strict=True)):
            value, opened = gate(F.pad(x, (2**k, 0))).chunk(2, dim=1)
            x = x + mix(torch.tanh(value) * torch.sigmoid(opened))
            skips = skips + x
        return self.out(F.relu(skips))


class SetTransformer(nn.Module):
    """Induced points attend to the set, pooling by a learned seed; padding is masked."""

    def __init__(self) -> None:
        super().__init__()
        a = lambda: nn.MultiheadAttention(D, H, batch_first=True)  # noqa: E731
        self.lift, self.points, self.seed = (
            nn.Linear(3, D),
            nn.Parameter(torch.randn(1, 3, D)),
            nn.Parameter(torch.randn(1, 1, D)),
        )
        self.down, self.up, self.pool = a(), a(), a()

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.lift(x)
        points = self.points.repeat(x.size(0), 1, 1)
        heard, _ = self.down(points, x, x, key_padding_mask=padding)
        x = x + self.up(x, heard, heard, need_weights=False)[0]
        return self.pool(self.seed.expand(x.size(0), -1, -1), x, x, key_padding_mask=padding)[0].squeeze(1)


class Perceiver(nn.Module):
    """Learned latents read the input, then talk among themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.norm = nn.Parameter(torch.randn(4, D)), nn.LayerNorm(D)
        self.q, self.kv = nn.Linear(D, D), nn.Linear(3, 2 * D)
        self.inner, self.head = nn.TransformerEncoderLayer(D, H, 12, dropout=0.0, batch_first=True), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        split = lambda t: t.unflatten(-1, (H, -1)).transpose(1, 2)  # noqa: E731
        latents = self.norm(self.latents).unsqueeze(0).expand(x.size(0), -1, -1)
        k, v = self.kv(x).chunk(2, -1)
        read = F.scaled_dot_product_attention(split(self.q(latents)), split(k), split(v))
        return self.head(self.inner(latents + read.transpose(1, 2).flatten(2)).mean(1))


class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi, self.rho = nn.Sequential(nn.Linear(3, 6), nn.ELU()), nn.Linear(6, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(x.shape[1], device=x.device)[None, :] < lengths[:, None]
        total = (self.phi(x) * real.unsqueeze(-1)).sum(1)
        return self.rho(total / lengths[:, None])


class Gcn(nn.Module):
    """Dense adjacency, normalised by degree."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        edges = edges + torch.eye(edges.size(-1), dtype=edges.dtype, device=edges.device)
        root = edges.sum(-1).clamp(min=1).pow(-0.5)
        edges = root.unsqueeze(-1) * edges * root.unsqueeze(-2)
        return torch.bmm(edges, self.b(F.relu(torch.bmm(edges, self.a(x))))).mean(1)


class Gat(nn.Module):
    """Additive attention over the edges of a padded graph, several heads."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.left, self.right = (
            nn.Linear(3, H * 4, bias=False),
            nn.Parameter(torch.randn(1, 1, H, 4)),
            nn.Parameter(torch.randn(1, 1, H, 4)),
        )

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.w(x).view(*x.shape[:2], H, 4)
        scores = F.leaky_relu((h * self.left).sum(-1).unsqueeze(2) + (h * self.right).sum(-1).unsqueeze(1), 0.2)
        open_ = (edges + torch.eye(4, dtype=edges.dtype)).unsqueeze(-1) > 0
        weights = torch.softmax(scores.masked_fill(~open_, float("-inf")), dim=2)
        return F.elu(torch.einsum("bijh,bjhf->bihf", weights, h)).flatten(2)


class Rotary(nn.Module):
    """Causal attention with rotary positions, written with complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = (
            nn.Embedding(V, D),
            nn.Linear(D, 3 * D, bias=False),
            nn.Linear(D, V, bias=False),
        )
        angle = torch.outer(torch.arange(16), 10000 ** (-torch.arange(0, D // H, 2) / (D // H)))
        self.register_buffer("turn", torch.stack([angle.cos(), angle.sin()], -1))

    def rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.view_as_complex(self.turn[: x.shape[2]])).flatten(3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(x + mixed.transpose(1, 2).flatten(2))


class Alibi(nn.Module):
    """Linear biases, a temperature for each head and a 4-D mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.temperature = nn.Linear(3, 3 * D), nn.Parameter(torch.ones(H, 1, 1))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, H + 1))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        t = x.shape[1]
        q, k, v = (u.view(-1, t, H, D // H).transpose(1, 2) for u in self.qkv(x).split(D, dim=-1))
        far = (torch.arange(t)[None, :] - torch.arange(t)[:, None]).abs()
        mask = (1.0 - (~padding)[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        scores = q @ k.transpose(-1, -2) * self.temperature - self.slopes[:, None, None] * far + mask
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, t, D)


class LinearAttention(nn.Module):
    """Gated linear attention: the state is carried by a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.gate = (nn.Linear(3, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x), torch.sigmoid(self.gate(x))
        state, outs = x.new_zeros(x.shape[0], 4, 4), []
        for t in range(x.shape[1]):
            state = gate[:, t].unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(1)
            outs.append((q[:, t].unsqueeze(1) @ state).squeeze(1))
        return torch.stack(outs, dim=1)


class Crf(nn.Module):
    """The forward algorithm of a conditional random field; its loss is the output."""

    def __init__(self, tags: int = 3) -> None:
        super().__init__()
        self.emit, self.move = nn.Linear(4, tags), nn.Parameter(torch.randn(tags, tags))
        self.start, self.end = nn.Parameter(torch.randn(tags)), nn.Parameter(torch.randn(tags))

    def forward(self, x: Tensor, tags: Tensor, real: Tensor) -> Tensor:
        emit, n = self.emit(x), torch.arange(x.shape[0])
        alpha = self.start + emit[:, 0]
        score = self.start[tags[:, 0]] + emit[:, 0].gather(1, tags[:, :1]).squeeze(1)
        for t in range(1, x.shape[1]):
            step = torch.logsumexp(alpha.unsqueeze(2) + self.move + emit[:, t].unsqueeze(1), dim=1)
            alpha = torch.where(real[:, t].unsqueeze(1), step, alpha)
            score = score + (self.move[tags[:, t - 1], tags[:, t]] + emit[n, t, tags[:, t]]) * real[:, t]
        last = real.sum(1) - 1
        score = score + self.end[tags.gather(1, last.unsqueeze(1)).squeeze(1)]
        return torch.logsumexp(alpha + self.end, dim=1) - score


class Ctc(nn.Module):
    """The loss inside the model, one for each record."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 5)

    def forward(self, x: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
        log = self.net(x).log_softmax(-1).transpose(0, 1)
        full = torch.full((x.shape[0],), x.shape[1], dtype=torch.long)
        return F.ctc_loss(log, target, full, lengths, reduction="none")


class SelectiveScan(nn.Module):
    """A state space whose steps depend on the input, by cumulative sums in the logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.inside, self.skip = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.decay = nn.Parameter(torch.rand(4).log())

    def forward(self, x: Tensor) -> Tensor:
        step = F.softplus(self.step(x))
        log = torch.cumsum(-step * self.decay.exp(), dim=1)
        total = torch.logcumsumexp(torch.log(F.softplus(self.inside(x)) * step) - log, dim=1)
        return torch.exp(total + log) + x * self.skip


def tied(s: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(s.l(s.e(x))), s.e.weight) / math.sqrt(D)


def recurrence(s: Any, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
    for step in x.unbind(1):
        h = torch.tanh(s.i(step) + s.h(h))
    return s.o(h)


def graph() -> tuple[Tensor, Tensor]:
    return R(B, 4, 3), adjacency()[0]


SEQUENCE: dict[str, Case] = {
    "WaveNet": Case(WaveNet, over(1, 8)),
    "causal convolution (T, B, d)": Case(lambda: Net(lambda s, x: s.c(F.pad(x.permute(1, 2, 0), (2, 0))).permute(2, 0, 1), c=nn.Conv1d(3, 4, 3)), lambda: (R(T, B, 3),), batch_dim=1, loss=lambda o: per_record(o.transpose(0, 1))),
    "Set Transformer": Case(SetTransformer, lambda: (R(B, 4, 3), PADDING)),
    "Perceiver": Case(Perceiver, over(4, 3)),
    "Deep Sets, lengths": Case(DeepSets, lambda: (R(B, 4, 3), LENGTHS)),
    "GCN, dense": Case(Gcn, graph),
    "GAT, dense": Case(Gat, graph),
    "rotary language model": Case(Rotary, ids()),
    "ALiBi, additive 4-D mask": Case(Alibi, lambda: (R(B, 4, 3), PADDING)),
    "gated linear attention": Case(LinearAttention, over(T, 3)),
    "CRF": Case(Crf, lambda: (R(B, 4, 4), torch.randint(0, 3, (B, 4)), ~PADDING)),
    "CTC inside": Case(Ctc, lambda: (R(B, 6, 3), torch.randint(1, 5, (B, 2)), torch.tensor([2, 1, 2, 1]))),
    "selective scan": Case(SelectiveScan, over(T, 4)),
    "tied embedding by hand": Case(lambda: Net(tied, e=nn.Embedding(V, D), l=nn.Linear(D, D)), ids()),
    "loop over a Linear": Case(lambda: Net(recurrence, i=nn.Linear(3, 4), h=nn.Linear(4, 4), o=nn.Linear(4, 2)), over(T, 3)),
    "bag and positions, segments": Case(lambda: Net(lambda s, x: s.n(s.e(x) + s.p(torch.arange(x.shape[1])) + s.t(torch.zeros_like(x))), e=nn.Embedding(V, D, padding_idx=0), p=nn.Embedding(T, D), t=nn.Embedding(2, D), n=nn.LayerNorm(D)), ids()),
    "last real token": Case(lambda: Net(lambda s, x: s.o(s.e(x)[torch.arange(len(x)), (x != 0).sum(1) - 1]), e=nn.Embedding(V, D), o=nn.Linear(D, 2)), lambda: (OWNED,)),
    "convolution as text classifier": Case(lambda: Net(lambda s, x: s.o(torch.cat([F.relu(c(s.e(x).mT)).amax(2) for c in s.c], 1)), e=nn.Embedding(V, 4), c=nn.ModuleList([nn.Conv1d(4, 3, k) for k in (2, 3)]), o=nn.Linear(6, 2)), ids()),
}  # fmt: skip
