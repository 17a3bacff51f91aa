# ruff: noqa: E501  (tables of one-line models)
"""torch's own layers, nested calls, checkpointing, odd inputs and outputs, empty and single records, low precision."""

import copy
from dataclasses import dataclass

import pytest
import torch
from tests.oracle.oracle import B, Net, R, agree, case, check, leaves, matrix, microbatch_of_one, per_record
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import sfumato as sf

attention = lambda **o: nn.MultiheadAttention(4, 2, **o)  # noqa: E731
encoder = lambda **o: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, **o)  # noqa: E731
X, SQUARE = (lambda: (R(B, 3, 4),)), (lambda: (R(B, B, 4),))
PADDING = torch.tensor([[0, 0, 1], [0, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()


def strict(out: Tensor) -> Tensor:
    assert out.shape[1:] == (2,)
    return per_record(out)


LAYERS = [
    case("multi-head attention", lambda: Net(lambda s, x: s.a(x, x, x)[0], a=attention(batch_first=True)), X),
    case("multi-head attention, weights too", lambda: Net(lambda s, x: s.a(x, x, x), a=attention(batch_first=True)), X),
    case("multi-head attention (T, B, d)", lambda: Net(lambda s, x: s.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), a=attention()), X),
    case("multi-head attention (T, B, d), T==B", lambda: Net(lambda s, x: s.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), a=attention()), SQUARE),
    case("multi-head attention, cross", lambda: Net(lambda s, x, y: s.a(x, y, y, need_weights=False)[0], a=attention(batch_first=True, kdim=3, vdim=3)), lambda: (R(B, 3, 4), R(B, 5, 3))),
    case("multi-head attention, bias_k", lambda: Net(lambda s, x: s.a(x, x, x)[0], a=attention(batch_first=True, add_bias_kv=True)), X),
    case("multi-head attention, weights, T = 1", lambda: Net(lambda s, x: (lambda o, w: torch.cat([o.transpose(0, 1).flatten(1), w.flatten(1)], 1))(*s.a(*[x.transpose(0, 1)] * 3)), a=attention()), lambda: (R(B, 1, 4),)),
    case("encoder layer", lambda: encoder(batch_first=True), X),
    case("encoder layer, norm first", lambda: encoder(batch_first=True, norm_first=True), SQUARE),
    case("encoder layer (T, B, d)", lambda: Net(lambda s, x: s.e(x.transpose(0, 1)).transpose(0, 1), e=encoder()), SQUARE),
    case("encoder with a padding mask", lambda: Net(lambda s, x, m: s.e(x, src_key_padding_mask=m), e=nn.TransformerEncoder(encoder(batch_first=True), 2, enable_nested_tensor=False)), lambda: (R(B, 3, 4), PADDING)),
    case("encoder with a causal mask", lambda: Net(lambda s, x: s.e(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)), e=nn.TransformerEncoder(encoder(batch_first=True), 1, enable_nested_tensor=False)), SQUARE),
    case("decoder layer", lambda: Net(lambda s, x, y: s.d(x, y), d=nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=True)), lambda: (R(B, 3, 4), R(B, 2, 4))),
    case("lstm", lambda: Net(lambda s, x: s.r(x)[0], r=nn.LSTM(4, 3, batch_first=True)), X),
    case("lstm, last state", lambda: Net(lambda s, x: s.o(s.r(x)[1][0][-1]), r=nn.LSTM(4, 3, batch_first=True), o=nn.Linear(3, 2)), X, loss=strict),
    case("lstm, last state squeezed", lambda: Net(lambda s, x: s.o(s.r(x)[1][0].squeeze(0)), r=nn.LSTM(4, 3, batch_first=True), o=nn.Linear(3, 2)), X, loss=strict),
    case("lstm, two layers", lambda: Net(lambda s, x: s.o(s.r(x)[1][0][-1]), r=nn.LSTM(4, 3, 2, batch_first=True), o=nn.Linear(3, 2)), X, loss=strict),
    case("lstm, as many layers as records", lambda: Net(lambda s, x: s.o(s.r(x)[1][0][-1]), r=nn.LSTM(4, 3, B, batch_first=True), o=nn.Linear(3, 2)), SQUARE, loss=strict),
    case("gru (T, B, d)", lambda: Net(lambda s, x: s.o(s.r(x.transpose(0, 1))[1].squeeze(0)), r=nn.GRU(4, 3), o=nn.Linear(3, 2)), X, loss=strict),
    case("gru (T, B, d), T==B", lambda: Net(lambda s, x: s.r(x.transpose(0, 1))[0].transpose(0, 1), r=nn.GRU(4, 3)), SQUARE),
    case("rnn, bidirectional", lambda: Net(lambda s, x: s.r(x)[0], r=nn.RNN(4, 3, batch_first=True, bidirectional=True)), X),
    case("lstm with initial state", lambda: Net(lambda s, x: s.r(x, (s.h.expand(1, x.shape[0], 3).contiguous(), torch.zeros(1, x.shape[0], 3, dtype=x.dtype)))[0], r=nn.LSTM(4, 3, batch_first=True), h=(3,)), X),
    *(case(cell.__name__, lambda cell=cell: Net(lambda s, x: s.c(x, torch.ones(x.shape[0], 3, dtype=x.dtype)), c=cell(4, 3)), lambda: (R(B, 4),)) for cell in (nn.GRUCell, nn.RNNCell)),
    case("LSTMCell unrolled", lambda: Net(lambda s, x: (lambda a: s.c(x[:, 1], a)[0])(s.c(x[:, 0])), c=nn.LSTMCell(4, 3)), X),
    case("bilinear", lambda: Net(lambda s, x: s.b(x[:, :3], x[:, 1:]), b=nn.Bilinear(3, 3, 2)), lambda: (R(B, 4),)),
    case("bilinear, no bias, rank 3", lambda: Net(lambda s, x: s.b(x, x), b=nn.Bilinear(4, 4, 2, bias=False)), X),
    case("prelu, one", lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU()), X),
    case("prelu, per channel", lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.PReLU(3)), lambda: (R(B, 2, 4, 4),)),
    case("prelu at zero", lambda: Net(lambda s, x: s.o(s.a(s.l(x) * 0 + s.b)), l=nn.Linear(4, 4), b=nn.Parameter(torch.zeros(4)), a=nn.PReLU(4), o=nn.Linear(4, 2)), lambda: (R(B, 4),)),
    case("glu", lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU()), X),
    case("adaptive pooling", lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)), lambda: (R(B, 2, 5, 5),)),
    case("max pooling", lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)), lambda: (R(B, 2, 5, 5),)),
    case("upsampling and pixel shuffle", lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.PixelShuffle(2), nn.Upsample(scale_factor=2), nn.Conv2d(1, 2, 2)), lambda: (R(B, 2, 3, 3),)),
    case("unfold to patches", lambda: Net(lambda s, x: s.l(F.unfold(x, 2, stride=2).mT), l=nn.Linear(8, 3)), lambda: (R(B, 2, 4, 4),)),
    case("dropout off", lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout1d(0.5), nn.Linear(4, 2)), X, train=False),
    case("dropout p = 0", lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.AlphaDropout(0.0), nn.Linear(4, 2)), X),
    case("parameter list", lambda: Net(lambda s, x: x * s.p[0] + s.p[1], p=nn.ParameterList([R(4), R(3, 1)])), X),
    case("the same layer under two names", lambda: _aliased(), X),
    case("checkpointed module", lambda: Net(lambda s, x: s.o(checkpoint(s.q, s.l(x), use_reentrant=False)), l=nn.Linear(4, 4), q=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4)), o=nn.Linear(4, 2)), X),
    case("checkpointed module with bare parameters", lambda: Net(lambda s, x: checkpoint(s.q, s.l(x), use_reentrant=False), l=nn.Linear(4, 4), q=Net(lambda s, x: torch.tanh(x * s.g + F.linear(x, s.w)), g=(4,), w=(4, 4))), X),
    case("checkpointed (T, B, d)", lambda: Net(lambda s, x: checkpoint(s.q, s.l(x).transpose(0, 1), use_reentrant=False).transpose(0, 1), l=nn.Linear(4, 4), q=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))), X),
    case("checkpointed (T, B, d), T==B", lambda: Net(lambda s, x: checkpoint(s.q, s.l(x).transpose(0, 1), use_reentrant=False).transpose(0, 1), l=nn.Linear(4, 4), q=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))), SQUARE),
    case("checkpointed, flattened", lambda: Net(lambda s, x: checkpoint(s.q, s.l(x).flatten(0, 1), use_reentrant=False).view(x.shape), l=nn.Linear(4, 4), q=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))), X),
    case("checkpointed attention", lambda: Net(lambda s, x: checkpoint(s.q, s.l(x), use_reentrant=False), l=nn.Linear(4, 4), q=encoder(batch_first=True)), X),
    case("checkpoint_sequential", lambda: Net(lambda s, x: checkpoint_sequential(s.q, 2, x, use_reentrant=False), q=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))), lambda: (R(B, 3, 4).requires_grad_(),)),
    case("checkpointed twice", lambda: Net(lambda s, x: checkpoint(s.q, checkpoint(s.q, x, use_reentrant=False), use_reentrant=False), q=nn.Sequential(nn.Linear(4, 4), nn.Tanh())), X),
]  # fmt: skip


def _aliased() -> nn.Module:
    model = Net(lambda s, x: s.b(torch.tanh(s.a(x))), a=nn.Linear(4, 4))
    model.b = model.a
    return model


@matrix(LAYERS)
def test_layer(case, dtype):
    check(case, dtype)


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


OUTPUTS = {
    "tensor": lambda h: h,
    "tuple": lambda h: (h, h.sum(1)),
    "dict": lambda h: {"logits": h, "pooled": h.mean(1)},
    "dataclass": lambda h: Output(h),
    "list": lambda h: [h],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name):
    check(
        case(
            "",
            lambda: Net(lambda s, x: OUTPUTS[name](s.l(x)), l=nn.Linear(4, 4)),
            X,
            loss=lambda o: (
                sum(per_record(v) for v in leaves(o) if v is not None) if name != "dataclass" else per_record(o.logits)
            ),
            same_forward=name != "dataclass",
        ).values[0],
        torch.float64,
    )


def test_submodules_called_from_the_loop():
    """``m.head(m.body(x))``: no outer forward, several calls, one backward."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(5, 5), nn.Tanh()), "head": nn.Linear(5, 2)}).double()
    x = R(B, 3, 5).double()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = model

        def forward(self, x):
            return self.m["head"](self.m["body"](x)) + self.m["head"](self.m["body"](2 * x))

    want = {n[2:]: g for n, g in microbatch_of_one(Whole(), (x,), per_record).items()}
    with sf.record(model) as tape:
        per_record(model["head"](model["body"](x)) + model["head"](model["body"](2 * x))).mean().backward()
    agree(tape, want, 1e-9)


def test_two_forwards_one_backward():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = R(B, 5).double(), R(B, 5).double()
    with sf.record(model) as tape:
        (per_record(model(x)).mean() + per_record(model(y)).mean()).backward()
    want = {
        n: g + h
        for (n, g), h in zip(
            microbatch_of_one(model, (x,), per_record).items(),
            microbatch_of_one(model, (y,), per_record).values(),
            strict=True,
        )
    }
    agree(tape, want, 1e-9)


def test_a_forward_without_backward_and_an_evaluation_leave_no_trace():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = R(B, 5).double()
    with sf.record(model) as tape:
        model(x * 3)
        with torch.no_grad():
            model(x * 2)
        inside = x.clone().requires_grad_()
        torch.autograd.grad(model(inside).sum(), inside)
        per_record(model(x)).mean().backward()
    agree(tape, microbatch_of_one(model, (x,), per_record), 1e-9)
    assert inside.grad is None


EMPTY = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)), (5,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 2)), (3, 5)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 2)),
        (1, 4, 4),
    ),
    "transposed convolution": (lambda: nn.ConvTranspose1d(2, 3, 2), (2, 4)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (3, 4)),
    "flattened": (
        lambda: Net(lambda s, x: s.l(x.reshape(-1, 5)).view(x.shape[0], 3, 5).mean(1), l=nn.Linear(5, 5)),
        (3, 5),
    ),
    "token": (
        lambda: Net(
            lambda s, x: s.h(torch.cat([s.c.expand(x.shape[0], -1, -1), x], 1) + s.p),
            h=nn.Linear(5, 5),
            c=(1, 1, 5),
            p=(4, 5),
        ),
        (3, 5),
    ),
    "folded heads": (
        lambda: Net(lambda s, x: s.l(x.view(x.shape[0] * 2, 2, 5)).view(x.shape[0], 4, 5), l=nn.Linear(5, 5)),
        (4, 5),
    ),
    "rule-less": (lambda: Net(lambda s, x: torch.cdist(s.l(x), s.w), l=nn.Linear(5, 5), w=(3, 5)), (5,)),
    "elementwise": (lambda: Net(lambda s, x: s.l(x) * s.g + s.g, l=nn.Linear(5, 5), g=(5,)), (5,)),
    "derived": (lambda: Net(lambda s, x: F.linear(x, s.a @ s.a), a=(5, 5)), (5,)),
    "bilinear": (lambda: Net(lambda s, x: s.b(x, x), b=nn.Bilinear(5, 5, 2)), (5,)),
    "loss inside": (lambda: Net(lambda s, x: s.l(x).pow(2).sum(), l=nn.Linear(5, 5)), (5,)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch(name):
    build, shape = EMPTY[name]
    model = build()
    with sf.record(model, loss_reduction="sum") as tape:
        model(R(0, *shape)).square().sum().backward()
    assert tape.sq_norms().shape == (0,)
    for parameter, total in tape.clipped_sum(1.0).items():
        assert total.shape == model.get_parameter(parameter).shape
        assert not total.any()
        assert tape.per_sample(parameter).shape == (0, *total.shape)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("name", [n for n in EMPTY if n != "loss inside"])
def test_a_single_record(name, positions):
    build, shape = EMPTY[name]
    check(case("", build, lambda: (R(1, *shape),), "microbatch").values[0], torch.float64)


LOW = {
    "mlp": (lambda: nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)), (16,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4)), (5, 16)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
        ),
        (3, 6, 6),
    ),
    "bare": (
        lambda: Net(lambda s, x: s.l(x * s.g + s.p[: x.shape[1]]), l=nn.Linear(16, 4), g=(16,), p=(9, 16)),
        (5, 16),
    ),
    "token": (
        lambda: Net(
            lambda s, x: s.l(torch.cat([s.c.expand(x.shape[0], -1, -1), x], 1)).mean(1),
            l=nn.Linear(16, 4),
            c=(1, 1, 16),
        ),
        (5, 16),
    ),
}


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("mode", ["bf16 parameters", "autocast"])
def test_low_precision(name, mode):
    """Half-precision arithmetic in the model; norms within 1 % of float64, sums in float32."""
    build, shape = LOW[name]
    torch.manual_seed(3)
    model = build()
    if mode == "bf16 parameters":
        model = model.bfloat16()
    x = R(8, *shape).to(next(model.parameters()).dtype)
    want = microbatch_of_one(copy.deepcopy(model).double(), (x.double(),), per_record)
    with sf.record(model) as tape, torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        loss = per_record(model(x)).float().mean()
        loss.backward()
    exact = torch.stack([g.flatten(1).square().sum(1) for g in want.values()]).sum(0).sqrt()
    norms = tape.sq_norms().sqrt()
    assert norms.dtype == torch.float32
    assert float(((norms - exact) / exact).abs().max()) < 0.01
    for total in tape.clipped_sum(0.5 * float(exact.median())).values():
        assert total.dtype == torch.float32
        assert total.isfinite().all()


def test_mixed_dtypes_of_parameters():
    model = Net(lambda s, x: s.h(s.l(x).double()), l=nn.Linear(5, 4), h=nn.Linear(4, 2).double())
    x = R(B, 5)
    want = microbatch_of_one(copy.deepcopy(model).double(), (x.double(),), per_record)
    with sf.record(model) as tape:
        per_record(model(x)).mean().backward()
    agree(tape, want, 1e-5)


def test_frozen_between_two_recordings():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = R(B, 5).double()
    for trainable in (True, False, True):
        model[0].requires_grad_(trainable)
        with sf.record(model) as tape:
            per_record(model(x)).mean().backward()
        agree(tape, microbatch_of_one(model, (x,), per_record), 1e-9)
        assert ("0.weight" in tape.tiers) is trainable


def test_nothing_stays_behind():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    before = (
        [set(vars(m)) for m in model.modules()],
        [set(vars(p)) for p in model.parameters()],
        list(model.state_dict()),
    )
    with sf.record(model):
        twin = copy.deepcopy(model)
        model(R(B, 5)).sum().backward()
    after = (
        [set(vars(m)) for m in model.modules()],
        [set(vars(p)) for p in model.parameters()],
        list(model.state_dict()),
    )
    assert before == after
    twin(R(B, 5)).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    model(R(B, 5)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_interrupted_forward_leaves_no_mode():
    def interrupted(s, x):
        s.l(x)
        raise KeyboardInterrupt

    model = Net(interrupted, l=nn.Linear(5, 5))
    with pytest.raises(KeyboardInterrupt), sf.record(model):
        model(R(B, 5))
    assert not torch.overrides._get_current_function_mode_stack()
    model.body = lambda s, x: s.l(x)
    with sf.record(model) as tape:
        model(R(B, 5)).sum().backward()
    assert tape.sq_norms().shape == (B,)
