# fmt: off
# ruff: noqa: E501  (tables of one-line operations)
"""The cases of ``claims`` element by element, of losses, transforms and algebra, and of recurrences and packing."""

import torch
from tests.ghost.claim_cases import D2, case, dims
from torch.nn import functional as F
from torch.nn.utils import rnn

# -- new tensors ------------------------------------------------------------------------------------------------------

for name in ("zeros_like", "ones_like", "rand_like", "randn_like"):
    case(name, "ab", lambda x, f=name: getattr(torch, f)(x))
case("empty_like", "ab", lambda x: torch.empty_like(x).fill_(1.0))
case("full_like", "ab", lambda x: torch.full_like(x, 2.0), wary=[lambda x: torch.full_like(x, x[0, 0]), lambda x: torch.zeros_like(x).fill_(x[0, 0])])
case("randint_like", "ab", lambda x: torch.randint_like(x, 5), lambda x: torch.randint_like(x, low=1, high=5))
case("new_zeros", "ab", lambda x: x.new_zeros(3), lambda x: x.new_zeros(x.shape))
case("new_ones", "ab", lambda x: x.new_ones((2, 3)))
case("new_empty", "ab", lambda x: x.new_empty(3).fill_(0.0))
case("new_full", "ab", lambda x: x.new_full((2,), 1.5), wary=[lambda x: x.new_full((2,), x.sum()), lambda x: torch.full((2,), x[0, 0])])

# -- elements ---------------------------------------------------------------------------------------------------------

for name in "relu relu6 gelu silu elu leaky_relu hardtanh mish softplus hardswish hardsigmoid celu selu softsign tanhshrink softshrink hardshrink".split():
    case(name, "ab", lambda x, f=name: getattr(F, f)(x))
case("log_sigmoid", "ab", lambda x: F.logsigmoid(x))
case("rrelu", "ab", lambda x: F.rrelu(x))
case("threshold", "ab", lambda x: F.threshold(x, 0.1, 20.0))
for name in "float double half bfloat16 long int contiguous clone detach positive conj resolve_conj resolve_neg abs neg negative absolute exp sin tanh erf floor round sign sigmoid square trunc nan_to_num frac reciprocal".split():
    case(name, "ab", lambda x, f=name: getattr(x * 30, f)())
for name in "bool invert logical_not".split():
    case(name, "ab/b", lambda x, f=name: getattr(x, f)() if f != "invert" else ~x)
for name in "abs neg exp tanh sigmoid round square clamp_min relu sin negative absolute".split():
    case(name, "ab", lambda x, f=name: getattr(x.clone(), f + "_")(*([0.1] if f == "clamp_min" else [])))
for name in "add sub mul div rsub eq ne lt gt le ge maximum minimum fmod remainder pow float_power atan2 copysign hypot multiply divide subtract greater greater_equal less less_equal not_equal floor_divide isclose true_divide".split():
    case(
        name,
        "ab/p ab/p,ab/p b/p,ab/p a1/p,b/p ab/p",
        lambda x, y, f=name: getattr(torch, f)((x * 5).round(), (y * 5).round()),
        lambda x, y, f=name: getattr(torch, f)(x * 5, y * 5) if f not in ("eq", "ne", "isclose", "not_equal") else getattr(torch, f)(x.round(), y.round()),
        wary=[] if "pow" in name else [lambda x, y, f=name: getattr(torch, f)(x, other=y)],
    )
for name, op in {
    "radd": lambda x, y: y.__radd__(x), "rmul": lambda x, y: x.__rmul__(y), "rsub": lambda x, y: x.__rsub__(y), "mod": lambda x, y: x.__mod__(y), "truediv": lambda x, y: x.__truediv__(y), "floordiv": lambda x, y: (x * 9).__floordiv__(y), "rdiv": lambda x, y: 2 / (x + y), "rfloordiv": lambda x, y: 9 // (x + y), "rmod": lambda x, y: 9 % (x + y), "rpow": lambda x, y: x.__rpow__(y),
    "iadd": lambda x, y: x.clone().__iadd__(y.reshape(-1)[0] * 0 + 1), "isub": lambda x, y: x.clone().__isub__(1.0), "imul": lambda x, y: x.clone().__imul__(2.0), "itruediv": lambda x, y: x.clone().__itruediv__(2.0),
}.items():  # fmt: skip
    case({"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "mod": "remainder", "rmul": "mul", "radd": "add", "truediv": "div"}.get(name, name), "ab/p ab/p", op)
for name in ("and", "or", "xor"):
    case(name, "ab/b ab/b,ab/b b/b", lambda x, y, f=name: getattr(x, f"__{f}__")(y))
    case(f"logical_{name}", "ab/b ab/b", lambda x, y, f=name: getattr(torch, f"logical_{f}")(x, y))
case("to", "ab", lambda x: x.to(torch.float32), lambda x: x.to("cpu", torch.float16), lambda x: x.to(torch.zeros(1)), wary=[lambda x: torch.zeros_like(x).to(x)])
case("type", "ab", lambda x: x.type(torch.float32))
case("type_as", "ab ab", lambda x, y: x.type_as(y), wary=[lambda x, y: torch.zeros(x.shape).type_as(x)])
case("cpu", "ab", lambda x: x.cpu())
case("data", "ab", lambda x: x.data)
case("real", "ab/z", lambda x: x.real, lambda x: torch.real(x))
case("imag", "ab/z", lambda x: x.imag, lambda x: torch.imag(x))
case("conj", "ab/z", lambda x: x.conj().resolve_conj())
case("H", "ab/z", lambda x: x.H)
case("mH", "ab/z", lambda x: x.mH)
case("complex", "ab ab", lambda x, y: torch.complex(x, y))
case("polar", "ab/p ab", lambda x, y: torch.polar(x, y))
case("masked_fill", "ab ab/b,ab b/b,ab a1/b", lambda x, m: x.masked_fill(m, 0.0), lambda x, m: x.clone().masked_fill_(m, value=1.0))
case("masked_fill", "ab ab/b b", wary=[lambda x, m, v: x.masked_fill(m, v[0]), lambda x, m, v: x.masked_fill(m, v.sum())])
case("where", "ab/b ab ab,ab/b b ab", lambda m, x, y: torch.where(m, x, y), lambda m, x, y: torch.where(m, x, 1.0), lambda m, x, y: y.where(m, x))
case("clip", "ab", lambda x: x.clip(-1, 1), lambda x: torch.clip(x, min=0.0), lambda x: x.clamp(max=1.0))
case("clip", "ab ab", lambda x, y: x.clip(y), wary=[lambda x, y: x.clamp(min=y, max=y + 1), lambda x, y: x.clamp(max=y[:1])])
case("lerp", "ab ab b", lambda x, y, w: x.lerp(y, w), lambda x, y, w: torch.addcmul(x, y, w), lambda x, y, w: torch.addcdiv(x, y, w, value=2))
case("fill", "ab", lambda x: x.clone().fill_(1.0) + x, wary=[lambda x: x.clone().fill_(x[0, 0])])
case("zero", "ab", lambda x: x.clone().zero_() + x)
case("requires_grad", "ab", wary=[lambda x: x.clone().requires_grad_() * 2])
case(
    "set",
    "ab ab",
    wary=[
        lambda x, y: _assign(x.clone(), y),
        lambda x, y: x.clone().resize_(2),
        lambda x, y: x.clone().swapaxes_(0, 1),
        lambda x, y: x.clone().t_(),
        lambda x, y: x.clone().squeeze_(),
        lambda x, y: x.clone().unsqueeze_(0),
        lambda x, y: torch.frexp(x),
        lambda x, y: torch.sum(x, 0, out=torch.zeros(x.shape[1]).double()),
        lambda x, y: torch.sort(x, dim=0, out=(torch.zeros(0).double(), torch.zeros(0).long())),
    ],
)
RANDOM = {
    "dropout": lambda x: F.dropout(x), "alpha_dropout": lambda x: F.alpha_dropout(x, training=True), "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, training=True), "dropout1d": lambda x: F.dropout1d(x), "dropout2d": lambda x: F.dropout2d(x.unsqueeze(-1)), "dropout3d": lambda x: F.dropout3d(x[..., None, None]),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()), "normal": lambda x: torch.normal(x, 1.0), "uniform": lambda x: x.clone().uniform_() + x,
}  # fmt: skip
for name, op in RANDOM.items():
    case(name, "abc", op, random=True)
case("gumbel_softmax", "abc", lambda x: F.gumbel_softmax(x, dim=-1), lambda x: F.gumbel_softmax(x, 1.0, False, 1e-10, 1), lambda x: F.gumbel_softmax(x, hard=True, dim=0), wary=[lambda x: F.gumbel_softmax(x)], random=True)
case("multinomial", "ab/p", lambda x: torch.multinomial(x**8, 2), lambda x: (x**8).multinomial(num_samples=1), random=True)


def _assign(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.data = y
    return x


# -- losses -----------------------------------------------------------------------------------------------------------

for name in "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div poisson_nll_loss soft_margin_loss".split():
    f = getattr(F, name)
    case(
        name,
        "abc/p abc/p",
        lambda x, y, f=f: f(x, y, reduction="none"),
        lambda x, y, f=f: f(x, y),
        lambda x, y, f=f: f(x, target=y, reduction="sum"),
        wary=[lambda x, y, f=f: f(input=x, target=y, reduction="none")] if name not in ("mse_loss",) else [lambda x, y: F.mse_loss(x, y, reduction="none", weight=y), lambda x, y: F.mse_loss(x, y, weight=torch.ones_like(x))],
    )
case(
    "binary_cross_entropy",
    "ab/p ab/p ab/p",
    wary=[
        lambda x, y, w: F.binary_cross_entropy(x, y, weight=w),
        lambda x, y, w: F.binary_cross_entropy(x, y, w, reduction="none"),
        lambda x, y, w: F.binary_cross_entropy_with_logits(x, y, pos_weight=w, reduction="none"),
        lambda x, y, w: F.mse_loss(x, y, reduction="none", weight=w),
        lambda x, y, w: F.smooth_l1_loss(x, y, reduction="sum"),
        lambda x, y, w: F.binary_cross_entropy_with_logits(x, y, w),
    ],
)
case(
    "gaussian_nll_loss",
    "ab ab ab/p",
    lambda x, y, v: F.gaussian_nll_loss(x, y, v, reduction="none"),
    lambda x, y, v: F.gaussian_nll_loss(x, y, v),
    lambda x, y, v: F.gaussian_nll_loss(x, y, var=v, reduction="sum"),
    wary=[lambda x, y, v: F.gaussian_nll_loss(x, y, v[:, 0], reduction="none"), lambda x, y, v: F.gaussian_nll_loss(x, y, var=v)],
)
case(
    "cross_entropy",
    "ab a/i",
    lambda x, y: F.cross_entropy(x, y, reduction="none"),
    lambda x, y: F.cross_entropy(x, y),
    lambda x, y: F.cross_entropy(x, target=y, reduction="sum"),
    wary=[
        lambda x, y: F.cross_entropy(x, y, ignore_index=0),
        lambda x, y: F.cross_entropy(x, y, x[0]),
        lambda x, y: F.cross_entropy(x, y, weight=torch.rand(x.shape[1]).double()),
        lambda x, y: F.cross_entropy(x, y, weight=torch.rand(x.shape[1]).double(), reduction="none"),
        lambda x, y: F.cross_entropy(x, y, weight=x[0].exp(), reduction="none"),
        lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
        lambda x, y: F.cross_entropy(input=x, target=y, reduction="none"),
    ],
)
case("cross_entropy", "abc ac/i", lambda x, y: F.cross_entropy(x, y, reduction="none"), lambda x, y: F.cross_entropy(x, y))
case("cross_entropy", "abc abc/p", lambda x, y: F.cross_entropy(x, y, reduction="none"), lambda x, y: F.cross_entropy(x, y, reduction="sum"), lambda x, y: F.cross_entropy(x, y))
case("cross_entropy", "a a/p", wary=[lambda x, y: F.cross_entropy(x, y), lambda x, y: F.cross_entropy(x, y, reduction="none"), lambda x, y: F.cross_entropy(x, torch.tensor(1))])
case("nll_loss", "ab a/i", lambda x, y: F.nll_loss(x, y, reduction="none"), lambda x, y: F.nll_loss(x, y, reduction="sum"), lambda x, y: F.nll_loss(x, y), wary=[lambda x, y: F.nll_loss(x, y, torch.rand(x.shape[1]).double())])
case(
    "ctc_loss",
    "abc",
    lambda x: F.ctc_loss(x.log_softmax(-1), torch.ones(x.shape[1], 2).long(), torch.full((x.shape[1],), x.shape[0]), torch.full((x.shape[1],), 1), reduction="none"),
    lambda x: F.ctc_loss(x.log_softmax(-1), torch.ones(x.shape[1], 2).long(), torch.full((x.shape[1],), x.shape[0]), torch.full((x.shape[1],), 1)),
    wary=[lambda x: F.ctc_loss(x.log_softmax(-1), torch.ones(x.shape[1]).long(), torch.full((x.shape[1],), x.shape[0]), torch.full((x.shape[1],), 1), reduction="sum"), lambda x: F.ctc_loss(x[:, 0].log_softmax(-1), torch.ones(1).long(), torch.tensor(x.shape[0]), torch.tensor(1), reduction="none")],
)
case("ctc_loss", "abc b2/i", wary=[lambda x, y: F.ctc_loss(x.log_softmax(-1), y + 1, torch.full((x.shape[1],), x.shape[0]), torch.full((x.shape[1],), 1), reduction="none"), lambda x, y: F.ctc_loss(x.log_softmax(-1), y + 1, torch.full((x.shape[1],), x.shape[0]), y[:, 0] + 1, reduction="none")], c=4)
case(
    "triplet_margin_loss",
    "ab ab ab",
    wary=[
        lambda x, y, z: F.triplet_margin_loss(x, y, z),
        lambda x, y, z: F.margin_ranking_loss(x, y, z.sign()),
        lambda x, y, z: F.cosine_embedding_loss(x, y, z[:, 0].sign()),
        lambda x, y, z: F.multilabel_margin_loss(x, (y > 0).long()),
        lambda x, y, z: F.hinge_embedding_loss(x, y.sign()),
        lambda x, y, z: F.pdist(x),
        lambda x, y, z: F.bilinear(x, y, torch.ones(2, x.shape[1], x.shape[1]).double()),
        lambda x, y, z: F.multi_margin_loss(x, (y[:, 0] > 0).long()),
    ],
)

# -- transforms and algebra -------------------------------------------------------------------------------------------

for kind in ("fft", "rfft", "hfft"):
    for i in ("", "i"):
        f = getattr(torch.fft, i + kind)
        case(f"fft_{i}{kind}", "abc", lambda x, f=f: f(x), lambda x, f=f: f(x, 3, 0), lambda x, f=f: f(x, dim=1), lambda x, f=f: f(x, n=4, dim=-2, norm="ortho"))
        f = getattr(torch.fft, i + kind + "2")
        case(f"fft_{i}{kind}2", "abc", lambda x, f=f: f(x), lambda x, f=f: f(x, (2, 2), (0, 1)), lambda x, f=f: f(x, dim=(0, -1)), lambda x, f=f: f(x, s=(2, 2)))
        f = getattr(torch.fft, i + kind + "n")
        case(f"fft_{i}{kind}n", "abc", lambda x, f=f: f(x, dim=(0, 1)), lambda x, f=f: f(x, s=(2,)), lambda x, f=f: f(x, (2, 2)), lambda x, f=f: f(x, None, (1,)), wary=[lambda x, f=f: f(x), lambda x, f=f: f(x, (2, 2, 2))])
for name in ("fftshift", "ifftshift"):
    case(f"fft_{name}", "abc", *dims(lambda x, d, f=name: getattr(torch.fft, f)(x, d), lambda x, d, f=name: getattr(torch.fft, f)(x, dim=(d,)), of=D2), wary=[lambda x, f=name: getattr(torch.fft, f)(x)])
case("stft", "a8", lambda x: torch.stft(x, 4, 2, window=torch.ones(4).double(), return_complex=True), wary=[lambda x: torch.stft(x[0], 4, 2, window=torch.ones(4).double(), return_complex=True)])
case("istft", "a35/z", lambda x: torch.istft(x, 4, 2, window=torch.ones(4).double()), wary=[lambda x: torch.istft(x, 4, 2, window=x[0, 0, :4].real.exp())])
case("view_as_complex", "ab2", lambda x: torch.view_as_complex(x.contiguous()))
case("view_as_real", "ab/z", lambda x: torch.view_as_real(x))
case("diag_embed", "ab", lambda x: torch.diag_embed(x), wary=[lambda x: x.diag_embed(0, 0, 1), lambda x: torch.diag_embed(x, dim1=0, dim2=2), lambda x: torch.diag_embed(x, offset=1), lambda x: torch.diag(x), lambda x: torch.diag(x[0])])
case("pairwise_distance", "ab ab,ab b,b ab", lambda x, y: F.pairwise_distance(x, y), wary=[lambda x, y: F.pairwise_distance(x, y, keepdim=True), lambda x, y: F.pairwise_distance(x1=x, x2=y)])
case("cdist", "abc adc,abc dc,bc dc,bc adc", lambda x, y: torch.cdist(x, y), wary=[lambda x, y: torch.cdist(x1=x, x2=y), lambda x, y: torch.cdist(x, x2=y)])
SPD = lambda x: x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype)  # noqa: E731
for name in "matrix_exp inverse pinverse det logdet slogdet cholesky".split():
    case(name, "abb,cabb", lambda x, f=name: getattr(torch, f)(SPD(x)), a=4, b=4)
case("matrix_power", "abb", lambda x: torch.matrix_power(x, 2), a=4, b=4)
for name in "inv pinv cholesky matrix_exp det slogdet qr svd svdvals eigh eigvalsh eig matrix_norm".split():
    case(f"linalg_{name}", "abb", lambda x, f=name: _invariant(getattr(torch.linalg, f)(SPD(x)), f), a=4, b=4)
case("linalg_matrix_power", "abb", lambda x: torch.linalg.matrix_power(x, 2), a=4, b=4)
case(
    "linalg_matrix_norm",
    "abb",
    lambda x: torch.linalg.matrix_norm(x),
    wary=[
        lambda x: torch.linalg.matrix_norm(x, "fro", (0, 1)),
        lambda x: torch.linalg.matrix_norm(x, dim=(0, 1)),
        lambda x: torch.linalg.matrix_norm(x, keepdim=True),
        lambda x: torch.linalg.lu(SPD(x)),
        lambda x: torch.linalg.cond(SPD(x)),
        lambda x: torch.linalg.matrix_rank(SPD(x)),
        lambda x: torch.linalg.lstsq(SPD(x), x),
        lambda x: torch.linalg.vander(x),
        lambda x: torch.cholesky_inverse(SPD(x)),
        lambda x: torch.linalg.diagonal(x),
    ],
    a=4,
    b=4,
)
case("linalg_solve", "abb abc", lambda x, y: torch.linalg.solve(SPD(x), y), wary=[lambda x, y: torch.linalg.solve(SPD(x), y[..., 0])], a=4)
case("linalg_solve", "aaa aa,aa aaa", wary=[lambda x, y: torch.linalg.solve(SPD(x), y), lambda x, y: torch.linalg.solve(SPD(x), y[0])])
case("linalg_solve_triangular", "abb abc", lambda x, y: torch.linalg.solve_triangular(SPD(x), y, upper=True), a=4)


def _invariant(out, name):
    """What does not hang on the signs of vectors."""
    return {"svd": lambda: out[1], "eigh": lambda: out[0], "eig": lambda: out[0].abs().sort(-1)[0], "qr": lambda: out[1].abs()}.get(name, lambda: out)()


# -- recurrences and packing ------------------------------------------------------------------------------------------


def weights(gates, size, hidden=2):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((gates * hidden, size), (gates * hidden, hidden), (gates * hidden,), (gates * hidden,))]


for name, gates in {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}.items():
    states = lambda x, b, n=name: (lambda h: (h, h) if n == "lstm" else h)(torch.zeros(1, x.shape[b], 2).double())  # noqa: E731
    run = lambda x, h, first, n=name, g=gates: getattr(torch, n)(x, h, weights(g, x.shape[-1]), True, 1, 0.0, False, False, first)  # noqa: E731
    case(name, "abc", lambda x, s=states, r=run: r(x, s(x, 1), False), lambda x, s=states, r=run: r(x, s(x, 0), True))
    cell = lambda x, h, n=name, g=gates: getattr(torch, n + "_cell")(x, [h, h] if n == "lstm" else h, *weights(g, x.shape[-1]))  # noqa: E731
    case(f"{name}_cell", "ab ac", cell, c=2)
case("gru", "abc 1bd,abc 1ad", lambda x, h: torch.gru(x, h, weights(3, x.shape[-1]), True, 1, 0.0, False, False, h.shape[1] == x.shape[0] != x.shape[1]), d=2)


def packed(x, lengths, first=True, sort=False, total=True):
    lengths = lengths.clamp(1, x.shape[1 if first else 0]).long()
    sequence = rnn.pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=sort)
    return rnn.pad_packed_sequence(sequence, batch_first=first, total_length=x.shape[1 if first else 0] if total else None)[0]


def data(x, lengths):
    return rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False).data


case(
    "pack_padded_sequence",
    "abc a/i",
    lambda x, n: data(x, n + 1),
    wary=[
        lambda x, n: rnn.pack_padded_sequence(x, torch.arange(x.shape[0], 0, -1).clamp(max=x.shape[1]), batch_first=True).data,
        lambda x, n: rnn.pack_sequence([x[0], x[1]], enforce_sorted=False).data,
        lambda x, n: rnn.pad_sequence([x[0], x[1]]),
        lambda x, n: data(x, n + 1)[:2],
        lambda x, n: data(x, n + 1).flip(0),
        lambda x, n: data(x, n + 1) * torch.arange(len(data(x, n + 1)))[:, None],
    ],
    moving=True,
)
case("pad_packed_sequence", "abc a/i", lambda x, n: packed(x, n + 1), wary=[lambda x, n: packed(x, n + 1, total=False), lambda x, n: packed(x.transpose(0, 1), n + 1, first=False), lambda x, n: packed(x, (n + 1).flip(0)), lambda x, n: packed(x, torch.arange(x.shape[0], 0, -1), sort=True)], moving=True)
case(
    "segment_reduce",
    "ab a/i",
    wary=[
        lambda x, n: torch.segment_reduce(x, "sum", lengths=torch.ones(x.shape[0]).long()),
        lambda x, n: torch.segment_reduce(x, "mean", offsets=torch.tensor([0, 2, x.shape[0]])),
        lambda x, n: torch.zeros(x.shape[0], x.shape[1]).double().index_add(0, n, x),
        lambda x, n: torch.zeros(2, x.shape[1]).double().index_add(0, n, x),
        lambda x, n: torch.zeros(2, x.shape[1]).double().scatter_reduce(0, n[:, None].expand(x.shape), x, "amax", include_self=False),
        lambda x, n: torch.bincount(n),
        lambda x, n: n.max(),
        lambda x, n: n.amax(),
        lambda x, n: torch.bincount(n, weights=x[:, 0]),
    ],
    moving=True,
)
case("lstm", "abc a/i", wary=[lambda x, n: _recurrent(x, n + 1, zeros=True), lambda x, n: _recurrent(x, n + 1, zeros=False), lambda x, n: x[n.argsort()], lambda x, n: x[n.argsort(descending=True)][n.argsort(descending=True).argsort()]], moving=True, b=4)


def _recurrent(x, lengths, zeros):
    sequence = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    g = torch.Generator().manual_seed(0)
    h = torch.zeros(1, x.shape[0], 2).double() if zeros else torch.randn(1, x.shape[0], 2, generator=g, dtype=torch.float64)
    return torch.lstm(sequence.data, sequence.batch_sizes, (h, h), weights(4, x.shape[-1]), True, 1, 0.0, False, False)
