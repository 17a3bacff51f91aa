# ruff: noqa: PT012  (a violation may surface in the forward or in the backward)
"""What couples records, bypasses the capture or cannot be clipped raises a typed error, before any gradient is seen."""

import pytest
import torch
from tests.oracle.oracle import B, Net, R, per_record
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sfumato as sf

SHIFT = torch.tensor([1, 2, 3, 0])
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*requires_grad=True to a scalar"),
]


def net(forward, **members):
    return Net(forward, l=nn.Linear(5, 5), h=nn.Linear(5, 5), **members).double()


def refused(model, inputs, loss=lambda out: per_record(out).sum(), error=sf.SfumatoError, **options):
    """Exactly a typed error; no gradient stays behind; the model works plainly afterwards."""
    state = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    with pytest.raises(error), sf.record(model, **options) as tape:
        loss(model(*inputs)).backward()
        tape.sq_norms()
    assert all(p.grad is None for p in model.parameters())
    for name, before in state.items():
        assert torch.equal(model.get_buffer(name), before), f"{name} was written to"


def inplace(change):
    def forward(s, x):
        h = s.l(x).clone()
        change(h)
        return s.h(h)

    return forward


def centre_column(h):
    h[:, 0] -= h[:, 0].mean()


def overwrite_row(h):
    h[0] = h[1]


def add_neighbour(h):
    h[1:] += h[:-1].clone()


def centre_view(h):
    h[:, :2].sub_(h[:, :2].mean(0))


def normalise_rows_together(h):
    h.div_(h.norm())


def masked_buffer(s, x):
    m = torch.zeros(x.shape[0], 5, dtype=x.dtype)
    m[x > 0] = 1
    return s.l(x) + F.linear(m - m.mean(0), s.h.weight)


def copied_buffer(s, x):
    t = torch.zeros(x.shape[0], 5, dtype=x.dtype)
    t[:, :].copy_(x)
    return s.l(x) + F.linear(t - t.mean(0), s.h.weight)


# Records meet in the output, or in the middle with a layer behind.
MIXING = {
    "centred": lambda h: h - h.mean(0),
    "centred by var_mean": lambda h: h / torch.var_mean(h, 0)[0],
    "minus the first": lambda h: h - h[0],
    "softmax over the batch": lambda h: h.softmax(0),
    "log_softmax over the batch": lambda h: F.log_softmax(h, dim=0),
    "similarity": lambda h: h @ h.T,
    "similarity by mm": lambda h: torch.mm(h, h.t()),
    "similarity by linear": lambda h: F.linear(h, h),
    "similarity by einsum": lambda h: torch.einsum("id,jd->ij", h, h),
    "similarity by cosine": lambda h: F.cosine_similarity(h[:, None], h[None], dim=-1),
    "cdist": lambda h: torch.cdist(h, h),
    "pairwise difference": lambda h: (h[:, None] - h[None]).abs().sum(-1),
    "attention over the batch": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "covariance": lambda h: h @ torch.cov(h.T),
    "cumsum": lambda h: h.cumsum(0),
    "cummin": lambda h: h.cummin(0)[0],
    "sort": lambda h: h.sort(0)[0],
    "roll": lambda h: h * h.roll(1, 0),
    "flip": lambda h: h + h.flip(0),
    "permuted": lambda h: h * h[SHIFT],
    "einsum permuted": lambda h: torch.einsum("bd,bd->b", h, h[SHIFT]).unsqueeze(1) * h,
    "chosen by a record": lambda h: h + h[h.argmax(1) % B],
    "index_select by a record": lambda h: h.index_select(0, h.argmax(1) % B) * 1,
    "embedding among records": lambda h: F.embedding(h.argmax(1) % B, h),
    "column norms": lambda h: F.normalize(h, dim=0),
    "whole norm": lambda h: h / h.norm(),
    "renorm": lambda h: h.renorm(2, 1, 1.0),
    "max of the batch": lambda h: h / h.max(),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "instance norm over records": lambda h: F.instance_norm(h.T[None])[0].T,
    "layer norm over records": lambda h: F.layer_norm(h.T, (B,)).T,
    "group norm over records": lambda h: F.group_norm(h.T, 1).T,
    "convolution over records": lambda h: F.conv1d(h.T[:, None], torch.ones(1, 1, 3, dtype=h.dtype), padding=1)[:, 0].T,
    "pooling over records": lambda h: F.avg_pool1d(h.T[None], 3, 1, 1)[0].T,
    "unfolded over records": lambda h: h.unfold(0, B, 1)[0].T * h,
    "pairs of records": lambda h: h.view(2, 2, 5).mean(1).repeat_interleave(2, 0) * h,
    "halves of the batch": lambda h: torch.cat([h[:2] * h[2:], h[2:]]),
    "index_add across records": lambda h: torch.zeros_like(h).index_add(0, SHIFT, h) * h,
    "scatter across records": lambda h: torch.zeros_like(h).scatter_add(0, SHIFT[:, None].expand(-1, 5), h) * h,
    "gathered across records": lambda h: h * h.gather(0, SHIFT[:, None].expand(-1, 5)),
    "matmul by a constant": lambda h: torch.eye(B, dtype=h.dtype).roll(1, 0) @ h + h,
    "fft over records": lambda h: torch.fft.fft(h, dim=0).real,
    "outer": lambda h: torch.outer(h[:, 0], h[:, 1]),
    "median": lambda h: h - h.median(0).values,
    "quantile": lambda h: h - h.quantile(0.5, 0),
    "std": lambda h: h / h.std(0),
    "product": lambda h: h + h.prod(0),
    "logsumexp": lambda h: h - h.logsumexp(0),
}


# Records meet in an operation that also takes a parameter.
WITH_PARAMETER = {
    "addcmul": lambda s, h: torch.addcmul(s.p, h, h[SHIFT]),
    "lerp": lambda s, h: torch.lerp(h, h[SHIFT], s.p),
    "where": lambda s, h: torch.where(h[SHIFT] > 0, s.p, h),
    "where, other axis": lambda s, h: torch.where((h[:, :B] > 0).t(), s.q, h[:, :B]),
    "einsum": lambda s, h: torch.einsum("bd,bd,d->bd", h, h[SHIFT], s.p),
    "addmm": lambda s, h: torch.addmm(h[SHIFT], h, s.w),
    "cat": lambda s, h: torch.cat([h, h[SHIFT], s.p.expand(B, -1)], 1),
    "stack": lambda s, h: torch.stack([h, h[SHIFT], s.p.expand(B, -1)], 1),
    "setitem": lambda s, h: (lambda t: (t.__setitem__(h[SHIFT] > 0, s.q), t)[1])(h.clone()),
    "bilinear": lambda s, h: F.bilinear(h, h[SHIFT], s.w.unsqueeze(0)),
}


@pytest.mark.parametrize("name", WITH_PARAMETER)
def test_mixing_beside_a_parameter(name):
    refused(net(lambda s, x: WITH_PARAMETER[name](s, s.l(x)), p=(5,), q=(), w=(5, 5)), (R(B, 5).double(),))


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("where", ["at the end", "in the middle", "before any layer"])
def test_mixing_records(name, where):
    mix = MIXING[name]
    forward = {
        "at the end": lambda s, x: mix(s.l(x)),
        "in the middle": lambda s, x: s.h(
            mix(s.l(x))[:, :4].repeat(1, 2)[:, :5].tanh() if mix(s.l(x)).shape[1] != 5 else mix(s.l(x))
        ),
        "before any layer": lambda s, x: s.h(mix(x)[:, :4].repeat(1, 2)[:, :5]),
    }[where]
    refused(net(forward), (R(B, 5).double(),))


@pytest.mark.parametrize("change", [centre_column, overwrite_row, add_neighbour, centre_view, normalise_rows_together])
def test_mixing_in_place(change):
    refused(net(inplace(change)), (R(B, 5).double(),))


@pytest.mark.parametrize("forward", [masked_buffer, copied_buffer])
def test_records_written_into_a_constant(forward):
    refused(net(forward), (R(B, 5).double(),))


# A loss computed inside the model that is no plain sum or mean over records.
LOSSES = {
    "token mean with ignored tokens": lambda h, x: (h * (x > 0)).sum() / (x > 0).sum(),
    "token mean by item": lambda h, x: (h * (x > 0)).sum() / (x > 0).sum().item(),
    "token mean by cross_entropy": lambda h, x: F.cross_entropy(h, torch.where(x[:, 0] > 0, x.argmax(1), -100)),
    "class weights": lambda h, x: F.cross_entropy(h, x.argmax(1), weight=torch.rand(5, dtype=h.dtype)),
    "balance loss": lambda h, x: (h.mean(0) * h.softmax(1).mean(0)).sum(),
    "product of means": lambda h, x: h.mean() * h.mean(),
    "exp of the mean": lambda h, x: h.mean().exp(),
    "root of the mean": lambda h, x: h.square().mean().sqrt(),
    "one over the sum": lambda h, x: torch.div(torch.ones((), dtype=h.dtype), h.sum()),
    "mse to a neighbour": lambda h, x: F.mse_loss(h, h[SHIFT]),
    "mse of pairs": lambda h, x: F.mse_loss(h[:, None].expand(-1, B, -1), h[None].expand(B, -1, -1)),
    "mse to the mean": lambda h, x: F.mse_loss(h, h.mean(0).expand_as(h)),
    "another record's label": lambda h, x: F.cross_entropy(h, x.argmax(1)[SHIFT]),
    "softmax over records": lambda h, x: F.cross_entropy(h.T, torch.zeros(5, dtype=torch.long)),
    "softmax over records, none": lambda h, x: F.cross_entropy(
        h.T, torch.zeros(5, dtype=torch.long), reduction="none"
    ).sum(),
    "triplets": lambda h, x: F.triplet_margin_loss(h, h[SHIFT], h[SHIFT.flip(0)]),
    "cosine pairs": lambda h, x: F.cosine_embedding_loss(h, h[SHIFT], torch.ones(B, dtype=h.dtype)),
    "contrastive": lambda h, x: F.cross_entropy(h @ h.T, torch.arange(B)),
    "variance": lambda h, x: h.var(0).sum(),
    "hardest record": lambda h, x: h.square().sum(1).max(),
    "hardest half": lambda h, x: h.square().sum(1).topk(2).values.sum(),
    "sorted": lambda h, x: (h.square().sum(1).sort().values * torch.arange(B)).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_couples_records(name):
    refused(net(lambda s, x: LOSSES[name](s.l(x), x)), (R(B, 5).double(),), loss=lambda out: out.sum())


class Pick(nn.Module):
    """Below the rule tier: an operation without a rule, then ``after``."""

    def __init__(self, after, reduce=False):
        super().__init__()
        self.p = nn.Parameter(R(5, 5))
        self.after, self.reduce = after, reduce
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("var", torch.ones(5))

    def forward(self, x):
        out = self.after(self, torch.cdist(x, self.p))
        return out.sum() if self.reduce else out


def images(x: Tensor) -> Tensor:
    return x[..., None, None] * torch.rand(2, 2, dtype=x.dtype)


AFTER = {
    "batch_norm": lambda s, x: F.batch_norm(images(x), None, None, training=True)[..., 0, 0],
    "batch_norm with running stats": lambda s, x: F.batch_norm(images(x), s.mean, s.var, training=True)[..., 0, 0],
    "centring": lambda s, x: x - x.mean(0),
    "softmax": lambda s, x: x.softmax(0),
    "cumsum": lambda s, x: x.cumsum(0),
    "similarity": lambda s, x: (x @ x.T).sum(1, keepdim=True) * x,
}


@pytest.mark.parametrize("after", AFTER)
def test_mixing_on_a_lower_tier(after):
    """vmap and the microbatch of one would turn coupling into another model without a word."""
    refused(nn.Sequential(nn.Linear(5, 5), Pick(AFTER[after]), nn.Linear(5, 2)).double(), (R(B, 5).double(),))


def test_a_scalar_from_a_lower_tier_meets_records():
    refused(net(lambda s, x: s.h(s.l(x) * s.q(x)), q=Pick(lambda s, x: x, reduce=True)), (R(B, 5).double(),))
    refused(net(lambda s, x: s.l(x) * s.q(x), q=Pick(lambda s, x: x, reduce=True)), (R(B, 5).double(),))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_batch_norm_in_training(affine, running, place):
    norm = nn.BatchNorm1d(5, affine=affine, track_running_stats=running)
    layers = {
        "first": [norm, nn.Linear(5, 5)],
        "middle": [nn.Linear(5, 5), norm, nn.Linear(5, 2)],
        "last": [nn.Linear(5, 5), norm],
    }
    refused(nn.Sequential(*layers[place]).double(), (R(B, 5).double(),))


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm2d(2), (B, 2, 4, 4)),
        (nn.BatchNorm3d(2, affine=False), (B, 2, 4, 4, 4)),
        (nn.SyncBatchNorm(2), (B, 2, 4, 4)),
    ],
)
def test_batch_norm_on_images(norm, shape):
    conv = nn.Conv3d(2, 2, 1) if len(shape) == 5 else nn.Conv2d(2, 2, 1)
    refused(nn.Sequential(conv, norm).double(), (R(shape).double(),), loss=lambda out: out.square().sum())


def test_batch_norm_without_running_stats_in_eval_mode():
    refused(
        nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, track_running_stats=False)).double().eval(),
        (R(B, 5).double(),),
    )


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_with_running_stats(affine):
    norm = nn.InstanceNorm1d(3, affine=affine, track_running_stats=True)
    refused(nn.Sequential(nn.Conv1d(2, 3, 1), norm).double(), (R(B, 2, 6).double(),))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_embedding_options(layer, options):
    if layer is nn.EmbeddingBag:
        options = {**options, "mode": "sum"}
    refused(layer(7, 4, **options).double(), (torch.randint(0, 7, (B, 3)),))


def test_ragged_bag():
    refused(nn.EmbeddingBag(7, 4, mode="sum").double(), (torch.randint(0, 7, (10,)), torch.tensor([0, 3, 5, 8])))


def test_transposed_input_with_as_many_positions_as_records():
    refused(net(lambda s, x: s.h(s.l(x))), (R(B, B, 5).double().transpose(0, 1),), error=sf.SfumatoError)


def test_rows_that_are_not_records():
    """A second call whose leading axis is not the batch of the first."""
    model = nn.ModuleDict({"body": nn.Linear(5, 5), "head": nn.Linear(5, 2)}).double()
    with pytest.raises(sf.SfumatoError), sf.record(model):
        model["head"](model["body"](R(B, 3, 5).double()).flatten(0, 1)).sum().backward()
    with pytest.raises(sf.SfumatoError), sf.record(model):
        model["head"](model["body"](R(B, 3, 5).double()).transpose(0, 1)).sum().backward()
    with pytest.raises(sf.SfumatoError), sf.record(model):
        model["head"](model["body"](R(B, B, 5).double()).transpose(0, 1)).sum().backward()
    with pytest.raises(sf.SfumatoError), sf.record(model):
        (model["body"](R(B, 5).double()).sum() + model["body"](R(B + 1, 5).double()).sum()).backward()


def test_a_model_without_a_batch():
    refused(Net(lambda s: s.w * 2, w=(5,)).double(), ())
    refused(Net(lambda s, x: s.w * x, w=(5,)).double(), (torch.tensor(2.0),))


def test_reentrant_checkpoint():
    refused(net(lambda s, x: s.h(checkpoint(s.q, s.l(x), use_reentrant=True)), q=nn.Linear(5, 5)), (R(B, 5).double(),))
    refused(
        net(lambda s, x: s.h(checkpoint(lambda t: t * s.w, s.l(x), use_reentrant=True)), w=(5,)), (R(B, 5).double(),)
    )


@pytest.mark.parametrize("function", [
    lambda s, t: F.linear(t, s.w, s.b), lambda s, t: F.linear(t, s.w), lambda s, t: t @ s.w, lambda s, t: t * s.b,
], ids=["linear with bias", "linear", "matmul", "product"])  # fmt: skip
def test_checkpoint_of_a_function_that_holds_parameters(function):
    """The recomputation runs outside the model: exact, or refused. Square weights pass torch's own metadata check."""
    x = R(B, 5).double()
    model = net(lambda s, x: s.h(checkpoint(lambda t: function(s, t), s.l(x), use_reentrant=False)), w=(5, 5), b=(5,))
    plain = net(lambda s, x: s.h(function(s, s.l(x))), w=(5, 5), b=(5,))
    exact_or_refused(model, plain, x)


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0)


def exact_or_refused(model, twin, x):
    """``model`` gives the norms of ``twin``, or a typed error; nothing between."""
    twin.load_state_dict(model.state_dict())
    with sf.record(twin) as want:
        per_record(twin(x)).mean().backward()
    try:
        with sf.record(model) as tape:
            per_record(model(x)).mean().backward()
    except (sf.SfumatoError, torch.utils.checkpoint.CheckpointError):
        return
    torch.testing.assert_close(tape.sq_norms(), want.sq_norms(), rtol=1e-9, atol=0)


def test_custom_function_with_a_parameter():
    custom = net(lambda s, x: s.h(Times.apply(s.l(x), s.w)), w=(5,))
    exact_or_refused(custom, net(lambda s, x: s.h(s.l(x) * s.w), w=(5,)), R(B, 5).double())


def test_parameter_outside_the_model():
    outside = nn.Parameter(R(5).double())
    layer = nn.Linear(5, 5).double()
    refused(net(lambda s, x: s.h(s.l(x) * outside)), (R(B, 5).double(),))
    refused(net(lambda s, x: s.h(layer(s.l(x)))), (R(B, 5).double(),))


def test_double_backward():
    def loss(out):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return out.sum() + grad.square().sum()

    x = R(B, 5).double().requires_grad_()
    refused(net(lambda s, x: s.h(s.l(x).tanh())), (x,), loss=loss)


def test_gradient_penalty_inside_the_model():
    def forward(s, x):
        x = x.detach().requires_grad_()
        out = s.h(s.l(x).tanh())
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out + grad.square().sum(1, keepdim=True)

    refused(net(forward), (R(B, 5).double(),))


def test_regulariser_in_the_loss():
    model = net(lambda s, x: s.h(s.l(x)))
    refused(model, (R(B, 5).double(),), loss=lambda out: out.sum() + sum(p.square().sum() for p in model.parameters()))


def test_parameter_used_in_the_loss():
    model = net(lambda s, x: s.l(x))
    refused(model, (R(B, 5).double(),), loss=lambda out: (out @ model.h.weight).sum())


def test_two_backwards():
    model = net(lambda s, x: s.h(s.l(x)))
    with sf.record(model):
        loss = model(R(B, 5).double()).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(sf.SfumatoError):
            loss.backward()
    with sf.record(model):
        model(R(B, 5).double()).sum().backward()
        again = model(R(B, 5).double()).sum()
        with pytest.raises(sf.SfumatoError):
            again.backward()
    assert all(p.grad is None for p in model.parameters())


def test_backward_after_the_recording():
    model = net(lambda s, x: s.h(s.l(x)))
    with sf.record(model):
        loss = model(R(B, 5).double()).sum()
    with pytest.raises(sf.SfumatoError):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_nothing_recorded():
    with sf.record(nn.Linear(5, 2)) as tape:
        pass
    for read in (tape.sq_norms, lambda: tape.clipped_sum(1.0), lambda: tape.per_sample("weight")):
        with pytest.raises(sf.SfumatoError):
            read()


def test_bad_arguments():
    with pytest.raises(sf.SfumatoError):
        sf.record(nn.Linear(5, 2), loss_reduction="none")
    model = nn.Linear(5, 2)
    with sf.record(model) as tape:
        model(R(B, 5)).sum().backward()
    with pytest.raises(sf.SfumatoError):
        tape.per_sample("nowhere")
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(sf.SfumatoError):
            tape.clipped_sum(bound)


def test_recorded_twice_at_once():
    model = nn.Linear(5, 2)
    with sf.record(model), pytest.raises(sf.SfumatoError), sf.record(model):
        pass
    with sf.record(model) as tape:
        model(R(B, 5)).sum().backward()
    assert tape.sq_norms().shape == (B,)


def test_scripted_layer():
    """Exact on a lower tier, or refused; never native gradients."""
    layer = nn.Linear(5, 5).double()
    model = net(lambda s, x: s.h(s.j(x)), j=torch.jit.script(layer))
    plain = net(lambda s, x: s.h(s.j(x)), j=layer)
    exact_or_refused(model, plain, R(B, 5).double())


def test_an_error_names_the_module_by_its_path():
    inner = nn.Sequential(nn.Linear(5, 5), Net(lambda s, x: s.l(x - x.mean(0)), l=nn.Linear(5, 2)))
    model = nn.Sequential(nn.Identity(), inner)
    with pytest.raises(sf.errors.CoupledRecords) as caught, sf.record(model):
        model(R(B, 5))
    assert caught.value.where == "1.1.l"
