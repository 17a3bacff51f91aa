# ruff: noqa: E501  (tables of one-line models)
"""Where the records lie: other layouts, T == B, flattened and folded axes, windows, masks, gathers, reuse."""

import torch
from tests.oracle.oracle import B, Net, R, Shared, case, check, matrix
from torch import nn
from torch.nn import functional as F


def model(name, forward, inputs=lambda: (R(B, 3, 5),), tier="rule", **more):
    def make():
        return Net(forward, l=nn.Linear(5, 5), h=nn.Linear(5, 5), n=nn.LayerNorm(5), p=(5,))

    return case(name, make, inputs, tier, **more)


def square(name, forward, tier="rule", **more):
    """The same model with as many positions as records."""
    return model(f"{name}, T==B", forward, lambda: (R(B, B, 5),), tier, **more)


def heads(s, x, fold):
    b, t, d = x.shape
    split = lambda h: h.view(b, t, 1, d).expand(b, t, 2, d).transpose(1, 2)  # noqa: E731
    q, k, v = split(s.l(x)), split(s.h(x) * s.p), split(s.l(s.n(x)))
    if fold:
        q, k, v = (z.reshape(b * 2, t, d) for z in (q, k, v))
        out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(b, 2, t, d)
    else:
        out = (q @ k.mT).softmax(-1) @ v
    return s.h(out.transpose(1, 2)).flatten(2)


def time_first(s, x):
    h = torch.tanh(s.l(x.transpose(0, 1)) * s.p)
    return s.h(s.n(h)).transpose(0, 1)


def flattened(s, x):
    b, t, d = x.shape
    h = s.l(x.reshape(b * t, d)) * s.p
    return s.h(h.view(b, t, d)) + s.n(h).view(b, t, d)


def time_first_flattened(s, x):
    b, t, d = x.shape
    h = s.l(x.transpose(0, 1).reshape(t * b, d)) * s.p + s.p
    return s.h(h).view(t, b, d).transpose(0, 1)


def windows(s, x, shift):
    """Swin: (B, H, W, C) to (B · windows, w·w, C) and back."""
    b, hh, ww, c = x.shape
    x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
    w = x.view(b, hh // 2, 2, ww // 2, 2, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, c)
    w = torch.tanh(s.l(w)) + s.p
    w = (w @ w.transpose(1, 2)).softmax(-1) @ s.h(w)
    w = w.view(b, hh // 2, ww // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, hh, ww, c)
    return s.n(w + x)


def recurrent(s, x):
    h = torch.zeros(x.shape[0], 5, dtype=x.dtype)
    for t in range(x.shape[1]):
        h = torch.tanh(s.l(x[:, t]) + s.h(h) * s.p)
    return h


def recurrent_outputs(s, x):
    h, out = x.new_zeros(x.shape[0], 5), []
    for step in x.unbind(1):
        h = torch.tanh(s.l(step) + s.h(h))
        out.append(h)
    return torch.stack(out, 1)


def buffered(s, x):
    out = torch.zeros(x.shape[1], x.shape[0], 5, dtype=x.dtype)
    for t in range(x.shape[1]):
        out[t] = s.l(x[:, t])
    return s.h(out).transpose(0, 1)


def packed(s, x):
    """Only the rows that a mask keeps reach the layer; a record may keep none."""
    keep = x[..., 0] > 0.3
    rows = torch.tanh(s.l(x[keep]) * s.p)
    out = torch.zeros_like(x)
    out[keep] = s.h(rows)
    return out


def last_token(s, x):
    at = (x[..., 0] > 0).long().sum(1).clamp_max(x.shape[1] - 1)
    return s.h(s.l(x)[torch.arange(x.shape[0]), at] * s.p)


def gathered(s, x):
    at = x[..., 0].argmax(1).view(-1, 1, 1).expand(-1, 1, x.shape[2])
    return s.h(s.l(x).gather(1, at).squeeze(1) * s.p)


def masked_mean(s, x):
    mask = (x[..., :1] > 0).to(x.dtype)
    return s.h((s.l(x) * mask).sum(1) / mask.sum(1).clamp_min(1))


def experts(s, x):
    flat = s.l(x).reshape(-1, 5)
    chosen = flat[:, 0] > 0
    out = torch.zeros_like(flat)
    for flag, expert in ((True, s.h), (False, s.n)):
        rows = (chosen == flag).nonzero().squeeze(1)
        out = out.index_add(0, rows, expert(flat[rows]))
    return out.view(x.shape)


def control_flow(s, x):
    h = s.l(x)
    for _ in range(x.shape[1]):
        h = s.h(h).tanh()
    return h + s.p if h.shape[-1] == 5 else h


LAYOUTS = [build(name, forward, **more) for build in (model, square) for name, forward, more in [
    ("batch first", lambda s, x: s.h(s.n(s.l(x)) * s.p), {}),
    ("(T, B, d)", time_first, {}),
    ("(T, B, d) contiguous", lambda s, x: s.h(s.l(x.permute(1, 0, 2).contiguous()) * s.p).permute(1, 0, 2), {}),
    ("(d, B, T)", lambda s, x: s.h(s.l(x.permute(2, 0, 1).permute(1, 2, 0)) + s.p), {}),
    ("(T, d, B)", lambda s, x: s.h((s.l(x) + s.p).permute(1, 2, 0).tanh().permute(2, 0, 1)), {}),
    ("movedim", lambda s, x: s.l(x.movedim(0, 1)).movedim(1, 0) * s.p, {}),
    ("flattened", flattened, {}),
    ("flattened (T·B)", time_first_flattened, {}),
    ("flatten method", lambda s, x: s.h(s.l(x.flatten(0, 1)) * s.p).unflatten(0, (-1, x.shape[1])), {}),
    ("heads", lambda s, x: heads(s, x, False), {}),
    ("folded heads", lambda s, x: heads(s, x, True), {}),
    ("einops-like", lambda s, x: s.l(x.unsqueeze(1).expand(-1, 2, -1, -1).reshape(-1, x.shape[1], 5)).view(x.shape[0], 2, -1, 5).sum(1), {}),
    ("self attention", lambda s, x: F.scaled_dot_product_attention(s.l(x), s.h(x), s.n(x)) * s.p, {}),
    ("self attention, causal", lambda s, x: F.scaled_dot_product_attention(s.l(x), s.h(x), s.n(x), is_causal=True), {}),
    ("attention with a constant mask", lambda s, x: ((s.l(x) @ s.h(x).mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)).softmax(-1) @ x, {}),
    ("attention with a padding mask", lambda s, x: ((s.l(x) @ s.h(x).mT).masked_fill((x[..., 0] > 1)[:, None, :], -1e4)).softmax(-1) @ x, {}),
    ("attention by keyword", lambda s, x: F.scaled_dot_product_attention(query=s.l(x), key=s.h(x), value=x), {}),
    ("recurrent from zeros", recurrent, {}),
    ("recurrent from new_zeros, stacked", recurrent_outputs, {}),
    ("assigned into a (T, B, d) buffer", buffered, {}),
    ("boolean rows out and back", packed, {"tier": "microbatch"}),
    ("last token by index pair", last_token, {}),
    ("gather", gathered, {}),
    ("masked mean", masked_mean, {}),
    ("routed experts", experts, {"tier": "microbatch"}),
    ("control flow", control_flow, {}),
    ("max over positions", lambda s, x: s.h(s.l(x).max(1).values), {}),
    ("mean over positions", lambda s, x: s.h(s.l(x).mean(dim=-2)), {}),
    ("top-k positions", lambda s, x: s.h(s.l(x).topk(2, dim=1).values), {}),
    ("sort", lambda s, x: s.h(s.l(x).sort(1)[0]), {}),
    ("cumsum over positions", lambda s, x: s.h(s.l(x).cumsum(1)), {}),
    ("flip positions", lambda s, x: s.h(s.l(x).flip(1) + s.l(x)), {}),
    ("roll positions", lambda s, x: s.h(s.l(x).roll(1, 1)), {}),
    ("shift by cat", lambda s, x: s.h(torch.cat([torch.zeros_like(x[:, :1]), s.l(x)[:, :-1]], 1)), {}),
    ("shift by pad", lambda s, x: s.h(F.pad(s.l(x)[:, :-1], (0, 0, 1, 0))), {}),
    ("first and last", lambda s, x: s.h(s.l(x)[:, 0]) + s.h(s.l(x)[:, -1]), {}),
    ("ellipsis and None", lambda s, x: s.h(s.l(x)[..., None, :][:, :, 0]), {}),
    ("split positions", lambda s, x: torch.cat([s.l(x[:, :1]), s.h(x[:, 1:])], 1), {}),
    ("unfold positions", lambda s, x: s.h(s.l(x).unfold(1, 2, 1).mT), {}),
    ("numpy index on positions", lambda s, x: s.h(s.l(x)[:, torch.arange(x.shape[1]).flip(0).numpy()]), {"tier": "vmap"}),
    ("numpy index before the records", lambda s, x: s.h(s.l(x).transpose(0, 1)[torch.tensor([0, 2, 1, 0]).numpy()].transpose(0, 1)), {"tier": "vmap"}),
    ("integer index", lambda s, x: s.h(s.l(x)[:, torch.tensor([0, 2, 0])]), {}),
    ("constant boolean index", lambda s, x: s.h(s.l(x)[:, torch.arange(x.shape[1]) != 1]), {}),
    ("permuted records come back", lambda s, x: s.h(s.l(x.flip(0)).flip(0)) if False else s.h(s.l(x)[torch.arange(x.shape[0]).flip(0)])[torch.arange(x.shape[0]).flip(0)], {"tier": "microbatch"}),
    ("repeat_interleave of records", lambda s, x: s.h(s.l(x.repeat_interleave(2, 0)) * s.p).view(x.shape[0], 2, -1, 5).mean(1), {}),
    ("records twice by cat", lambda s, x: sum(s.h(s.l(torch.cat([x, x * 2])) * s.p).chunk(2)), {}),
    ("records twice by repeat", lambda s, x: s.h(s.l(x.repeat(2, 1, 1)) * s.p).view(2, x.shape[0], -1, 5).sum(0), {}),
    ("chunks of records", lambda s, x: torch.cat([s.l(c) for c in x.chunk(2)]), {}),
    ("layer twice", lambda s, x: s.l(torch.tanh(s.l(x))) * s.p + s.p, {}),
    ("layer in two ranks", lambda s, x: s.l(x) + s.l(x.mean(1)).unsqueeze(1), {}),
    ("residual stack", lambda s, x: x + s.h(F.gelu(s.l(s.n(x)))) + s.n(x), {}),
    ("outputs in a tuple", lambda s, x: (s.l(x), {"a": s.h(x).mean(1)}, [s.n(x)]), {}),
    ("loss of shape (B, 1)", lambda s, x: s.h(s.l(x)).mean((1, 2)).unsqueeze(1), {"loss": lambda o: o**2}),
    ("loss (B, 1) by mse", lambda s, x: s.h(s.l(x)).mean((1, 2)).unsqueeze(1), {"loss": lambda o: F.mse_loss(o, torch.ones_like(o), reduction="none")}),
    ("sum reduction", lambda s, x: s.h(s.l(x)) * s.p, {"reduction": "sum"}),
    ("requires_grad_ in the forward", lambda s, x: s.h(torch.tanh(s.l(x.detach().requires_grad_()))), {}),
]]  # fmt: skip

LAYOUTS += [
    case(f"window partition, shift {shift}, side {side}", lambda shift=shift: Net(lambda s, x: windows(s, x, shift), l=nn.Linear(3, 3), h=nn.Linear(3, 3), n=nn.LayerNorm(3), p=(3,)), lambda side=side: (R(B, side, side, 3),), tol32=1e-4)
    for shift in (0, 1)
    for side in (4, 2, 8)
]  # fmt: skip
LAYOUTS += [
    model("input that requires grad", lambda s, x: s.h(torch.tanh(s.l(x))), lambda: (R(B, 3, 5).requires_grad_(),)),
    model("loss inside the model, mean", lambda s, x: F.mse_loss(s.l(x), x), loss=lambda o: o.reshape(1)),
    model("loss inside the model, sum", lambda s, x: (s.l(x) - x).pow(2).sum(), loss=lambda o: o.reshape(1), reduction="sum"),
    model("cross entropy inside the model", lambda s, x: F.cross_entropy(s.l(x).mean(1), x[:, 0].argmax(1)), loss=lambda o: o.reshape(1)),
    model("token cross entropy inside the model", lambda s, x: F.cross_entropy(s.l(x).mT, x.argmax(2), reduction="none").mean(1)),
    model("a second input", lambda s, x, y: s.h(s.l(x) * y.unsqueeze(1)) + s.n(y).unsqueeze(1), lambda: (R(B, 3, 5), R(B, 5))),
    model("a shared mask", lambda s, x, m: (s.l(x) @ s.h(x).mT + m).softmax(-1) @ x, lambda: (R(B, 3, 5), Shared(R(3, 3)))),
    model("keyword-only", lambda s, *, tokens, scale: s.h(s.l(tokens) * scale.unsqueeze(1)), lambda: {"tokens": R(B, 3, 5), "scale": R(B, 5)}),
    model("a dict", lambda s, batch: s.h(s.l(batch["x"])) * batch["w"].view(-1, 1, 1), lambda: ({"x": R(B, 3, 5), "w": R(B)},)),
    model("a nested tuple", lambda s, pair: s.h(s.l(pair[0]) + pair[1][0]), lambda: ((R(B, 3, 5), (R(B, 3, 5),)),)),
    model("siamese", lambda s, a, b: (s.l(a) - s.l(b)).pow(2), lambda: (R(B, 3, 5), R(B, 3, 5))),
    model("in-batch distances within one record", lambda s, x: torch.cdist(s.l(x), s.h(x)), tier="vmap"),
    model("cosine of two towers", lambda s, a, b: F.cosine_similarity(s.l(a), s.h(b), dim=-1), lambda: (R(B, 3, 5), R(B, 3, 5))),
    model("records on axis 1", time_first, lambda: (R(3, B, 5),), batch_dim=1, loss=lambda o: o.square().sum((0, 2)).add(o.sum((0, 2)))),
    model("records on axis 1, T==B", time_first, lambda: (R(B, B, 5),), batch_dim=1, loss=lambda o: o.square().sum((0, 2)).add(o.sum((0, 2)))),
]  # fmt: skip


@matrix(LAYOUTS)
def test_layout(case, dtype):
    check(case, dtype)
