# ruff: noqa: E501  (tables of one-line models)
"""Recurrent networks in place: every option of torch's own modules, padded and packed, on the fast rule."""

import copy
from unittest import mock

import pytest
import torch
from tests.oracle.oracle import B, Net, R, agree, case, check, matrix, microbatch_of_one, per_record
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import sfumato as sf
from sfumato.errors import CoupledRecords, SfumatoError

T, D, H = 3, 4, 3
relu = lambda *a, **o: nn.RNN(*a, nonlinearity="relu", **o)  # noqa: E731
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn tanh": nn.RNN, "rnn relu": relu}
X, SQUARE = (lambda: (R(B, T, D),)), (lambda: (R(B, B, D),))
LENGTHS, SORTED = torch.tensor([2, 3, 1, 3]), torch.tensor([3, 3, 2, 1])


def first(h):
    """States (L, B, ·) with the records first, whatever the module returns."""
    return tuple(s.transpose(0, 1) for s in (h if isinstance(h, tuple) else (h,)))


def everything(s, x, hx=None):
    out, h = s.r(x, hx)
    return (out, *first(h))


def time_first(s, x):
    out, h = s.r(x.transpose(0, 1))
    return (out.transpose(0, 1), *first(h))


def packed(s, x, lengths, enforce_sorted=False, hx=None):
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    out, h = s.r(packed, hx)
    out, lengths = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
    return (out, *first(h), lengths)


def packed_time_first(s, x, lengths):
    out, h = s.r(pack_padded_sequence(x.transpose(0, 1), lengths.cpu(), enforce_sorted=False))
    out, _ = pad_packed_sequence(out, total_length=x.shape[1])
    return (out.transpose(0, 1), *first(h))


def between_layers(s, x, lengths):
    """Layers of one's own on packed rows."""
    p = pack_padded_sequence(s.l(x), lengths, batch_first=True, enforce_sorted=False)
    p = p._replace(data=torch.tanh(s.l(p.data)) * s.g)
    out, _ = s.r(p)
    out = out._replace(data=s.h(out.data))
    return pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]


def sorted_by_hand(s, x, lengths):
    lengths, order = lengths.sort(descending=True)
    out, h = s.r(pack_padded_sequence(x[order], lengths, batch_first=True))
    back = order.argsort()
    out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
    return (out[back], *(s.transpose(0, 1)[back] for s in (h if isinstance(h, tuple) else (h,))))


def learned(s, x, lengths=None):
    """Initial states that are trained: a parameter expanded over the batch."""
    states = tuple(p.expand(-1, x.shape[0], -1).contiguous() for p in s.states)
    hx = states if len(states) == 2 else states[0]
    return everything(s, x, hx) if lengths is None else packed(s, x, lengths, hx=hx)


def from_record(s, x):
    """An initial state computed from the record, with a copy for each layer."""
    h = torch.tanh(s.l(x[:, 0])).expand(2, -1, -1)
    return everything(s, x, (h, h * 2) if isinstance(s.r, nn.LSTM) else h)


def fed_back(s, x):
    one, state = s.r(x)
    two, state = s.r(x * 2, state)
    return one, two, *first(state)


def grid(name, kind):
    make = KINDS[kind]
    net = lambda forward, *a, **o: lambda: Net(forward, r=make(D, H, *a, batch_first=True, **o))  # noqa: E731
    states = 2 if kind == "lstm" else 1

    def learning(layers):
        return Net(
            learned,
            r=make(D, H, layers, batch_first=True),
            states=nn.ParameterList([R(layers, 1, H) for _ in range(states)]),
        )

    def frozen():
        model = Net(everything, r=make(D, H, 2, batch_first=True))
        for n, p in model.named_parameters():
            p.requires_grad_(n in ("r.weight_hh_l0", "r.bias_ih_l0", "r.weight_ih_l1"))
        return model

    def all_frozen():
        model = Net(
            lambda s, x: s.o(s.r(s.l(x))[0]), l=nn.Linear(D, D), r=make(D, H, 2, batch_first=True), o=nn.Linear(H, 2)
        )
        model.r.requires_grad_(False)
        return model

    return [case(f"{kind}, {n}", b, i, **o) for n, b, i, o in [
        ("all outputs", net(everything), X, {}),
        ("all outputs, T==B", net(everything), SQUARE, {}),
        ("output only", net(lambda s, x: s.r(x)[0]), X, {}),
        ("last step only", net(lambda s, x: s.r(x)[0][:, -1]), X, {}),
        ("state only", net(lambda s, x: first(s.r(x)[1])), X, {}),
        ("one layer's state only", net(lambda s, x: first(s.r(x)[1])[-1][:, 1], 2), X, {}),
        ("(T, B, d)", lambda: Net(time_first, r=make(D, H)), X, {}),
        ("(T, B, d), T==B, two layers", lambda: Net(time_first, r=make(D, H, 2)), SQUARE, {}),
        ("two layers", net(everything, 2), X, {}),
        ("as many layers as records", net(everything, B), SQUARE, {}),
        ("bidirectional", net(everything, bidirectional=True), X, {}),
        ("three layers, bidirectional, no bias", net(everything, 3, bidirectional=True, bias=False), X, {}),
        ("one step", net(everything), lambda: (R(B, 1, D),), {}),
        ("one record", net(everything, 2), lambda: (R(1, T, D),), {}),
        ("inside other layers", lambda: Net(lambda s, x: s.o(s.r(torch.tanh(s.l(x)))[0].relu()).mean(1), l=nn.Linear(D, D), r=make(D, H, batch_first=True), o=nn.Linear(H, 2)), X, {}),
        ("zeros given", net(lambda s, x: everything(s, x, (torch.zeros(1, x.shape[0], H, dtype=x.dtype),) * 2 if states == 2 else torch.zeros(1, x.shape[0], H, dtype=x.dtype))), X, {}),
        ("learned state", lambda: learning(1), X, {}),
        ("learned state, two layers, T==B", lambda: learning(2), SQUARE, {}),
        ("learned state, packed", lambda: learning(2), lambda: (R(B, T, D), LENGTHS), {}),
        ("state from the record", lambda: Net(from_record, l=nn.Linear(D, H), r=make(D, H, 2, batch_first=True)), X, {}),
        ("state from the record, constant input", lambda: Net(lambda s, x: s.r(torch.ones(x.shape[0], 2, D, dtype=x.dtype), (lambda h: (h, h) if states == 2 else h)(s.l(x).unsqueeze(0)))[0], l=nn.Linear(D, H), r=make(D, H, batch_first=True)), lambda: (R(B, D),), {}),
        ("learned input, state from the record", lambda: Net(lambda s, x: s.r(s.p.expand(x.shape[0], -1, -1), (lambda h: (h, h) if states == 2 else h)(s.l(x).unsqueeze(0)))[0], l=nn.Linear(D, H), r=make(D, H, batch_first=True), p=(2, D)), lambda: (R(B, D),), {}),
        ("state fed back", net(fed_back), X, {}),
        ("used twice", net(lambda s, x: s.r(x)[0] + s.r(x.flip(1))[0], 2), X, {}),
        ("weights of two modules tied", lambda: tied(make), X, {}),
        ("some frozen", frozen, X, {}),
        ("all frozen, between others", all_frozen, X, {}),
        ("folded rows", net(lambda s, x: s.r(x.reshape(x.shape[0] * 2, T, D))[0].reshape(x.shape[0], 2, T, H)), lambda: (R(B, 2, T, D),), {}),
        ("inputs that want a gradient", net(everything), lambda: (R(B, T, D).requires_grad_(),), {}),
        ("packed", net(packed), lambda: (R(B, T, D), LENGTHS), {}),
        ("packed, T==B", net(packed, 2), lambda: (R(B, B, D), LENGTHS + 1), {}),
        ("packed, bidirectional, two layers", net(packed, 2, bidirectional=True), lambda: (R(B, T, D), LENGTHS), {}),
        ("packed in order", net(lambda s, x, n: packed(s, x, n, True), 2, bidirectional=True), lambda: (R(B, T, D), SORTED), {}),
        ("packed, happens to be in order", net(packed), lambda: (R(B, T, D), SORTED), {}),
        ("packed, equal lengths", net(packed, bidirectional=True), lambda: (R(B, T, D), torch.tensor([T] * B)), {}),
        ("packed, one record", net(packed, bidirectional=True), lambda: (R(1, T, D), torch.tensor([2])), {}),
        ("packed, (T, B, d)", lambda: Net(packed_time_first, r=make(D, H, 2)), lambda: (R(B, T, D), LENGTHS), {}),
        ("packed, one frozen", net_frozen(packed, make), lambda: (R(B, T, D), LENGTHS), {}),
        ("packed, sorted by hand", net(sorted_by_hand), lambda: (R(B, T, D), LENGTHS), {}),
        ("packed, layers between", lambda: Net(between_layers, l=nn.Linear(D, D), r=make(D, H, batch_first=True), h=nn.Linear(H, 2), g=(D,)), lambda: (R(B, T, D), LENGTHS), {}),
    ]]  # fmt: skip


def tied(make):
    model = Net(lambda s, x: s.r(x)[0] * s.q(x)[0], r=make(D, H, batch_first=True), q=make(D, H, batch_first=True))
    model.q.weight_hh_l0 = model.r.weight_hh_l0
    return model


def net_frozen(forward, make):
    def build():
        model = Net(forward, r=make(D, H, 2, batch_first=True))
        model.r.weight_ih_l0.requires_grad_(False)
        return model

    return build


GRID = [c for kind in KINDS for c in grid(kind, kind)]

PROJECTED = [
    case("projected", lambda: Net(everything, r=nn.LSTM(D, H, proj_size=2, batch_first=True)), X),
    case("projected, two layers, bidirectional", lambda: Net(everything, r=nn.LSTM(D, H, 2, proj_size=2, bidirectional=True, batch_first=True)), X),
    case("projected, no bias", lambda: Net(time_first, r=nn.LSTM(D, H, 2, proj_size=1, bias=False)), SQUARE),
    case("projected, packed", lambda: Net(packed, r=nn.LSTM(D, H, 2, proj_size=2, bidirectional=True, batch_first=True)), lambda: (R(B, T, D), LENGTHS)),
    case("only h", lambda: Net(lambda s, x: s.r(x)[1][0].transpose(0, 1), r=nn.LSTM(D, H, batch_first=True)), X),
    case("only c", lambda: Net(lambda s, x: s.r(x)[1][1].transpose(0, 1), r=nn.LSTM(D, H, 2, batch_first=True)), X),
]  # fmt: skip


def unrolled(s, x):
    state, out = None, []
    for step in x.unbind(1):
        state = s.c(step, state)
        out.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(out, 1)


CELLS = [
    c for kind, make in {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn tanh": nn.RNNCell, "rnn relu": lambda *a, **o: nn.RNNCell(*a, nonlinearity="relu", **o)}.items() for c in [
        case(f"{kind} cell", lambda make=make: Net(lambda s, x: s.c(x), c=make(D, H)), lambda: (R(B, D),)),
        case(f"{kind} cell, no bias", lambda make=make: Net(lambda s, x: s.c(x), c=make(D, H, bias=False)), lambda: (R(B, D),)),
        case(f"{kind} cell, unrolled", lambda make=make: Net(unrolled, c=make(D, H)), X),
        case(f"{kind} cell, unrolled, T==B", lambda make=make: Net(unrolled, c=make(D, H)), SQUARE),
        case(f"{kind} cell, learned state", lambda make=make, kind=kind: Net(lambda s, x: s.c(x, (s.p.expand(x.shape[0], -1),) * 2 if kind == "lstm" else s.p.expand(x.shape[0], -1)), c=make(D, H), p=(1, H)), lambda: (R(B, D),)),
        case(f"{kind} cell, frozen", lambda make=make: Net(lambda s, x: s.l(unrolled(s, x)), c=make(D, H).requires_grad_(False), l=nn.Linear(H, 2)), X),
    ]
]  # fmt: skip


@matrix([*GRID, *PROJECTED, *CELLS])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
def test_recurrent(case, dtype):
    check(case, dtype)


# -- dropout between layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pack", [False, True])
def test_dropout_with_known_masks_gives_the_oracle(kind, pack):
    """Masks are kept as they are drawn, and handed to each record of the oracle in turn."""
    torch.manual_seed(4)
    model = Net(
        packed if pack else everything, r=KINDS[kind](D, 5, 3, dropout=0.5, bidirectional=True, batch_first=True)
    ).double()
    x, drawn = R(B, T, D).double(), []
    inputs = (x, torch.full((B,), T)) if pack else (x,)

    def drop(h, p, *_):
        drawn.append((torch.rand_like(h) > p).to(h.dtype) / (1 - p))
        return h * drawn[-1]

    with mock.patch("sfumato.ghost.rules.recurrent.F.dropout", drop), sf.record(model) as tape:
        per_record(model(*inputs)).mean().backward()
    assert len(drawn) == 2  # not after the last layer
    masks = [m.unflatten(0, (T, B)) for m in drawn]
    assert all(not torch.equal(m[:, 0], m[:, 1]) for m in masks)

    def by_hand(b):
        h, layers = x[b : b + 1], layered(model.r)
        states = []
        for k, layer in enumerate(layers):
            h, state = layer(h)
            states.append(state if isinstance(state, tuple) else (state,))
            if k < 2:
                h = h * masks[k][:, b]
        ends = tuple(torch.cat(s).transpose(0, 1) for s in zip(*states, strict=True))
        lengths = (torch.full((1,), T),) if pack else ()
        grads = torch.autograd.grad(per_record((h, *ends, *lengths)).sum(), [p for m in layers for p in m.parameters()])
        return dict(zip([n for n, _ in model.named_parameters()], grads, strict=True))

    rows = [by_hand(b) for b in range(B)]
    agree(tape, {n: torch.stack([r[n] for r in rows]) for n in rows[0]}, 1e-9)
    assert set(tape.tiers.values()) == {"rule"}


def layered(module):
    """Each layer of a recurrent module as a module of its own."""
    layers = []
    for k in range(module.num_layers):
        width = module.input_size if k == 0 else 2 * module.hidden_size
        one = type(module)(width, module.hidden_size, bidirectional=True, batch_first=True)
        if isinstance(module, nn.RNN):
            one = nn.RNN(
                width, module.hidden_size, nonlinearity=module.nonlinearity, bidirectional=True, batch_first=True
            )
        one = one.double()
        for name, p in one.named_parameters():
            p.data = getattr(module, name.replace("_l0", f"_l{k}")).detach().clone()
        layers.append(one)
    return layers


def test_dropout_has_torchs_distribution():
    """Means and variances of what the second layer sees, over records: those of independent Bernoulli masks."""
    torch.manual_seed(0)
    model = Net(
        lambda s, x: s.r(x)[0], r=nn.RNN(1, 400, 2, dropout=0.3, batch_first=True, nonlinearity="relu", bias=False)
    )
    with torch.no_grad():
        model.r.weight_ih_l0.fill_(1)
        model.r.weight_hh_l0.zero_()
        model.r.weight_ih_l1.copy_(torch.eye(400))
        model.r.weight_hh_l1.zero_()
    x = torch.ones(200, 3, 1)
    with sf.record(model):
        out = model(x).detach()
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    kept = (out > 0).float()
    assert abs(float(kept.mean()) - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    for axis in (0, 1, 2):  # a mask shared along an axis would have the variance of one draw there
        spread = float(kept.mean(axis).var())
        assert spread == pytest.approx(0.21 / kept.shape[axis], rel=0.2)
    model.eval()
    with sf.record(model):
        assert float(model(x).detach().min()) == 1.0


def test_dropout_draws_the_masks_of_torch():
    model = Net(everything, r=nn.GRU(D, H, 3, dropout=0.5, bidirectional=True))
    x = R(T, B, D)
    torch.manual_seed(3)
    want = model.r(x)[0]
    torch.manual_seed(3)
    with sf.record(model, batch_dim=1):
        got = model.r(x)[0]
    torch.testing.assert_close(got, want)


# -- weights computed from parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1"])
@pytest.mark.parametrize("pack", [False, True])
def test_weight_norm(kind, which, pack):
    """Not in the grid: torch cannot copy such a module."""
    torch.manual_seed(5)
    layer = weight_norm(KINDS[kind](D, H, 2, batch_first=True).double(), which)
    model = Net(packed if pack else everything, r=layer)
    inputs = (R(B, T, D).double(), *((LENGTHS,) if pack else ()))
    with sf.record(model) as tape:
        per_record(model(*inputs)).mean().backward()
    names = [n for n, _ in model.named_parameters()]
    assert f"r.parametrizations.{which}.original0" in names
    rows = [
        torch.autograd.grad(per_record(model(*(v[b : b + 1] for v in inputs))).sum(), list(model.parameters()))
        for b in range(B)
    ]
    agree(tape, {n: torch.stack([r[k] for r in rows]) for k, n in enumerate(names)}, 1e-9)
    assert set(tape.tiers.values()) == {"rule"}


# -- precision, empty batches, refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["bf16 parameters", "autocast"])
def test_low_precision(kind, mode):
    torch.manual_seed(3)
    model = Net(lambda s, x: s.o(s.r(x)[0]), r=KINDS[kind](8, 16, 2, batch_first=True), o=nn.Linear(16, 2))
    if mode == "bf16 parameters":
        model = model.bfloat16()
    x = R(8, 5, 8).to(next(model.parameters()).dtype)
    want = microbatch_of_one(copy.deepcopy(model).double(), (x.double(),), per_record)
    with sf.record(model) as tape, torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        per_record(model(x)).float().mean().backward()
    exact = torch.stack([g.flatten(1).square().sum(1) for g in want.values()]).sum(0).sqrt()
    assert float(((tape.sq_norms().sqrt() - exact) / exact).abs().max()) < 0.01
    assert set(tape.tiers.values()) == {"rule"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind):
    model = Net(everything, r=KINDS[kind](D, H, 2, bidirectional=True, batch_first=True))
    with sf.record(model, loss_reduction="sum") as tape:
        per_record(model(R(0, T, D))).sum().backward()
    assert tape.sq_norms().shape == (0,)
    assert not any(total.any() for total in tape.clipped_sum(1.0).values())


@pytest.mark.parametrize("kind", KINDS)
def test_time_and_records_exchanged_is_refused(kind):
    model = Net(lambda s, x: s.r(x)[0], r=KINDS[kind](D, H))
    with pytest.raises(CoupledRecords, match="batch_first"), sf.record(model):
        model(R(B, T, D))


@pytest.mark.parametrize("kind", KINDS)
def test_records_as_the_steps_of_one_sequence_are_refused(kind):
    model = Net(lambda s, x: s.r(x)[0], r=KINDS[kind](D, H))
    with pytest.raises(CoupledRecords), sf.record(model):
        model(R(B, D))


REFUSED = {
    "padded to the longest": lambda s, x, n: pad_packed_sequence(s.r(pack_padded_sequence(x, n, True, False))[0], True)[0].sum(1),
    "rows picked from a packed batch": lambda s, x, n: s.r(pack_padded_sequence(x, n, True, False))[0].data[:5].sum(),
    "the longest three": lambda s, x, n: s.r(x[n.argsort()][:3])[0].sum(),
    "sorted by another tensor's lengths": lambda s, x, n: s.r(pack_padded_sequence(x[n.argsort()], n.sort(descending=True)[0], True))[0].data.sum(),
    "lengths sorted, records not": lambda s, x, n: s.r(pack_padded_sequence(x, n.sort(descending=True)[0], True))[0].data.sum(),
    "sorted and left so": lambda s, x, n: s.r(x[n.argsort()])[0],
    "a permutation in a sum": lambda s, x, n: s.r(x * n.argsort()[:, None, None])[0],
    "step sizes in a sum": lambda s, x, n: s.r(x * pack_padded_sequence(x, n, True, False).batch_sizes.sum())[0],
    "another state": lambda s, x, n: s.r(x, (x[:, 0, :H].flip(0).unsqueeze(0),) * 2)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model = Net(REFUSED[name], r=nn.LSTM(D, H, batch_first=True))
    with pytest.raises(SfumatoError), sf.record(model):
        model(R(B, T + 1, D), LENGTHS).sum().backward()


def test_a_second_pass_over_one_graph_is_the_same():
    """Nothing that was saved is overwritten by the first backward."""
    model = Net(lambda s, x: s.r(x)[0], r=nn.LSTM(D, H, batch_first=True)).double()
    x = R(B, T, D).double().requires_grad_()
    with sf.record(model) as tape:
        loss = per_record(model(x))
        one, two = (torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for _ in range(2))
        loss.mean().backward()
    assert torch.equal(one, two)
    agree(tape, microbatch_of_one(model, (x.detach(),), per_record), 1e-9)
