"""Models of plain torch: exact, and on the rule tier unless ``LOWER`` says why not."""

import copy

import pytest
import torch
from tests.matrix.plain import MODELS
from tests.oracle.oracle import B, Net, R, agree, check, leaves, microbatch_of_one, per_record
from torch import nn
from torch.nn import functional as F

import sfumato as sf
from sfumato.errors import CoupledRecords, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

# {model: why it is not on the rule tier}; its Case names the tier that it is on.
LOWER: dict[str, str] = {}


@pytest.mark.parametrize("name", MODELS)
def test_in_double_precision(name):
    tape = check(MODELS[name], torch.float64)
    assert set(tape.tiers.values()) == {"rule"} or name in LOWER


@pytest.mark.parametrize("name", [*MODELS][::3])
def test_in_single_precision(name):
    check(MODELS[name], torch.float32)


def test_there_are_many():
    assert len(MODELS) >= 45


def _random() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True)
    decoder = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.3)
    attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
    weights = Net(lambda s, x: s.a(x, x, x, average_attn_weights=False), a=attention)
    memory = Net(lambda s, x, y: s.d(*(t.transpose(0, 1) for t in (x, y))).transpose(0, 1), d=decoder)
    return {
        "encoder": (nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (R(B, 3, 8),)),
        "decoder (T, B, d)": (memory, (R(B, 3, 8), R(B, 4, 8))),
        "attention, weights": (weights, (R(B, 3, 8),)),
    }


@pytest.mark.parametrize("name", _random())
def test_dropout_is_that_of_torch(name):
    """With the same seed, the same forward; the gradients of the records add up to the gradient of the batch."""
    torch.manual_seed(0)
    model, inputs = _random()[name]
    model, inputs = model.double(), tuple(x.double() for x in inputs)
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    native = twin(*inputs)
    per_record(native).sum().backward()
    torch.manual_seed(5)
    with sf.record(model, loss_reduction="sum") as tape:
        out = model(*inputs)
        per_record(out).sum().backward()
    assert set(tape.tiers.values()) == {"rule"}
    for mine, theirs in zip(leaves(out), leaves(native), strict=True):
        torch.testing.assert_close(mine, theirs)
    for parameter, p in twin.named_parameters():
        torch.testing.assert_close(tape.per_sample(parameter).sum(0), p.grad)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_of_the_old_style():
    """Its hook puts a computed tensor in the place of the weight, which torch cannot deepcopy."""
    torch.manual_seed(0)
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        new[0].parametrizations.weight.original0.copy_(old[0].weight_g)
        new[0].parametrizations.weight.original1.copy_(old[0].weight_v)
        for ours, theirs in ((new[0].bias, old[0].bias), (new[2].weight, old[2].weight), (new[2].bias, old[2].bias)):
            ours.copy_(theirs)
    x = R(B, 6).double()
    want = microbatch_of_one(new, (x,), per_record)
    names = {"0.parametrizations.weight.original0": "0.weight_g", "0.parametrizations.weight.original1": "0.weight_v"}
    with sf.record(old) as tape:
        per_record(old(x)).mean().backward()
    agree(tape, {names.get(n, n): g for n, g in want.items()}, 1e-9)
    assert set(tape.tiers.values()) == {"rule"}


def _cut(s, x):
    return s.l(x - x[:1])


MIXED = {
    "minus the first record": (_cut, R(B, 5)),
    "a frequency of the batch": (lambda s, x: s.l(torch.fft.fft(x, dim=0).real), R(B, 5)),
    "a transform of every axis": (lambda s, x: s.l(torch.fft.fftn(x).abs()), R(B, 5)),
    "distances among the records": (lambda s, x: torch.cdist(s.l(x), s.l(x)), R(B, 5)),
    "differences of neighbours": (lambda s, x: s.l(torch.diff(x, dim=0, append=x[:1])), R(B, 5)),
    "attention among the records": (lambda s, x: F.scaled_dot_product_attention(*[s.l(x)[None]] * 3)[0], R(B, 5)),
    "the first record picks for all": (lambda s, x: s.l(x[:, :, 0])[:, x[0, :, 0].argsort()[:2]], R(B, 5, B)),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_mixed_records_are_refused(name):
    forward, x = MIXED[name]
    model = Net(forward, l=nn.Linear(5, 5))
    with pytest.raises(CoupledRecords), sf.record(model):
        model(x).square().sum().backward()


@pytest.mark.parametrize("layout", ["batch first as (T, B, d)", "flat"])
def test_attention_and_bags_of_another_layout_are_refused(layout):
    if layout == "flat":
        model, inputs = nn.EmbeddingBag(7, 3), (torch.tensor([1, 2, 3, 3, 3]), torch.tensor([0, 2]))
        error, words = UnsupportedError, "pass a 2-D input"
    else:
        model, inputs = Net(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2)), (R(B, 3, 4),)
        error, words = CoupledRecords, "batch_first=True"
    with pytest.raises(error, match=words), sf.record(model):
        model(*inputs).sum().backward()
