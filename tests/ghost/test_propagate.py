# ruff: noqa: E501  (tables of one-line models)
"""Propagation against a judge: perturb one record and see which elements of the output move.

Wherever propagation names rows, exactly the elements of a record may depend on that record. Coupled and Unknown are
always allowed; the last test keeps that from becoming an excuse.
"""

import pytest
import torch
from tests.oracle.oracle import Net
from torch import nn
from torch.nn import functional as F

import sfumato as sf
from sfumato.ghost import Capture, install, remove
from sfumato.ghost.rows import Reduced, Rows, owners

B, T = 4, 4  # as many positions as records: a guess by shape would be found out
PERM = torch.tensor([2, 0, 3, 1])

FOLLOWED = {
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(2, 0, 1),
    "movedim": lambda x: x.movedim(0, -1),
    "mT": lambda x: x.mT,
    "swapaxes": lambda x: x.swapaxes(0, 2),
    "flatten": lambda x: x.flatten(0, 1),
    "flatten T·B": lambda x: x.transpose(0, 1).flatten(0, 1),
    "view": lambda x: x.view(B * T, -1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "unsqueeze": lambda x: x.unsqueeze(0).unsqueeze(-1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "expand": lambda x: x.unsqueeze(0).expand(B, -1, -1, -1),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "repeat_interleave other": lambda x: x.repeat_interleave(2, 1),
    "sum": lambda x: x.sum(1),
    "mean negative": lambda x: x.mean(-2, keepdim=True),
    "amax": lambda x: x.transpose(0, 1).amax(0),
    "max": lambda x: x.max(1)[0],
    "std": lambda x: x.std(dim=2),
    "norm": lambda x: x.norm(dim=1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "softmax": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(-1),
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(2, 1)[0],
    "flip": lambda x: x.flip(1, 2),
    "roll": lambda x: x.roll(1, 1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "glu": lambda x: F.glu(x[..., :4]),
    "slice": lambda x: x[:, 1:],
    "slice of records": lambda x: x[1:],
    "ellipsis": lambda x: x[..., 0],
    "none": lambda x: x[None, :, None],
    "integer": lambda x: x[:, 2],
    "indices": lambda x: x[:, PERM],
    "records by index": lambda x: x[PERM],
    "records by pair": lambda x: x[torch.arange(B), PERM],
    "constant mask": lambda x: x[:, PERM > 0],
    "mask of records": lambda x: x[PERM > 0],
    "mask over both": lambda x: x[torch.eye(B) > 0],
    "own mask": lambda x: x[x[..., 0] > -9],
    "chunk": lambda x: x.chunk(2, 1)[1],
    "chunk of records": lambda x: x.chunk(2)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "narrow": lambda x: x.narrow(0, 1, 2),
    "select": lambda x: x.select(1, 0),
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "cat of records": lambda x: torch.cat([x, x * 2, x[:1]]),
    "stack": lambda x: torch.stack([x, x], 0),
    "stack last": lambda x: torch.stack([x, x], -1),
    "pad": lambda x: F.pad(x, (1, 1, 2, 0)),
    "matmul": lambda x: x @ x.mT,
    "matmul const": lambda x: x @ torch.ones(5, 3),
    "const matmul": lambda x: torch.ones(3, T) @ x,
    "bmm": lambda x: torch.bmm(x, x.transpose(1, 2)),
    "einsum": lambda x: torch.einsum("btd,bsd->sbt", x, x),
    "linear const": lambda x: F.linear(x, torch.ones(3, 5)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "pointwise": lambda x: torch.where(x > 0, x, x.tanh()) * x.exp() + 1,
    "broadcast const": lambda x: x + torch.ones(3, 1, T, 5),
    "layer_norm": lambda x: F.layer_norm(x, (5,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "pool": lambda x: F.avg_pool1d(x, 2),
    "conv const": lambda x: F.conv1d(x, torch.ones(3, T, 2)),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "gather": lambda x: x.gather(1, torch.zeros(B, 1, 5, dtype=torch.long)),
    "index_select": lambda x: x.index_select(1, PERM),
    "tril": lambda x: x.tril(),
    "cosine": lambda x: F.cosine_similarity(x, x * 2 + 1, dim=-1),
    "clone": lambda x: x.clone().detach(),
    "mse": lambda x: F.mse_loss(x, x * 2, reduction="none"),
    "cross entropy": lambda x: F.cross_entropy(x, x.argmax(1), reduction="none"),
}
# Whatever is said of these, it may not be wrong.
TREACHEROUS = {
    "unfold over records": lambda x: x.unfold(0, B, 1),
    "unfold over records, short": lambda x: x.unfold(0, 2, 2),
    "pixel_shuffle unbatched": lambda x: F.pixel_shuffle(x, 2),
    "conv unbatched": lambda x: F.conv1d(x[..., 0], torch.ones(B, B, 1)),
    "F.unfold unbatched": lambda x: F.unfold(x, 2),
    "renorm": lambda x: x.renorm(2, 1, 0.1),
    "renorm of records": lambda x: x.renorm(2, 0, 0.1),
    "cosine broadcast": lambda x: F.cosine_similarity(x[:, None, 0], x[None, :, 0], dim=-1),
    "einsum permuted": lambda x: torch.einsum("btd,btd->bt", x, x[PERM]),
    "embedding": lambda x: F.embedding(x[:, 0].argmax(1) % B, x[:, 0]),
    "own index": lambda x: x[x[:, 0].argmax(1) % B],
    "own index_select": lambda x: x.index_select(0, x[:, 0].argmax(1) % B),
    "transposed mask": lambda x: x[(x[..., 0] > 0).t()],
    "tensordot": lambda x: torch.tensordot(x, x, dims=([1, 2], [1, 2])),
    "diagonal": lambda x: x.diagonal(0, 0, 1),
    "diff": lambda x: x.diff(dim=0),
    "rot90": lambda x: x.rot90(1, (0, 1)),
    "where pair": lambda x: torch.where(x[..., 0] > 0)[0].double(),
    "reshape across": lambda x: x.reshape(2, 2, 2, 2, 5).transpose(0, 3).reshape(4, 4, 5),
    "view shorter": lambda x: x.view(2, 2 * T, 5),
    "flatten all": lambda x: x.flatten().view(5, T, B),
    "cross entropy over records": lambda x: F.cross_entropy(x, torch.zeros(B, 5).long(), reduction="none"),
    "cross entropy transposed": lambda x: F.cross_entropy(x[..., 0].t(), torch.zeros(B).long(), reduction="none"),
    "mse permuted": lambda x: F.mse_loss(x, x[PERM], reduction="none"),
    "matmul of records": lambda x: x.transpose(0, 1) @ x.permute(1, 2, 0),
    "outer sum": lambda x: x[:, None, 0] + x[None, :, 0],
    "numpy index": lambda x: x.transpose(0, 1)[PERM.numpy()],
    "range index": lambda x: x.transpose(0, 1)[[0, 2, 1, 0]],
    "put_along": lambda x: x.scatter(0, PERM.view(-1, 1, 1).expand(B, 1, 5), x[:, :1]),
    "norm of all": lambda x: x / x.norm(),
    "aminmax": lambda x: torch.aminmax(x, dim=0)[0],
    "kthvalue": lambda x: x.kthvalue(2, dim=0)[0],
    "isin": lambda x: torch.isin(x.round(), x[0].round()).double(),
    "searchsorted": lambda x: torch.searchsorted(x[0, 0].sort()[0], x.contiguous()).double(),
    "instance norm of records": lambda x: F.instance_norm(x.transpose(0, 1)),
    "batch of attention": lambda x: F.scaled_dot_product_attention(
        x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1)
    ),
}


def tag_and_influence(op):
    """(tag of the output, output, which elements move when record b moves)."""
    seen = {}

    def forward(s, x):
        out = op(x)
        seen["tag"], seen["out"] = seen["capture"].tag(out), out
        return x * s.p

    model = Net(forward, p=(1,)).double()
    x = torch.randn(B, T, 5, dtype=torch.float64)
    op_double = lambda z: op(z)  # noqa: E731
    capture = seen["capture"] = Capture(model)
    install(capture)
    try:
        capture.refresh()
        capture.open(lambda _: None, B)
        model(x)
    finally:
        capture.close()
        remove(capture)
    out = op_double(x)
    moved = []
    for b in range(B):
        y = x.clone()
        y[b] = torch.randn(T, 5, dtype=torch.float64)
        other = op_double(y)
        moved.append(other != out if other.shape == out.shape else None)
    return seen["tag"], out, moved


def truthful(tag, out, moved):
    if isinstance(tag, Rows):
        owner = owners(tag, B, out.device)
        assert owner.numel() == out.shape[tag.axis], "as many owners as rows"
        owner = owner.view(-1, *[1] * (out.dim() - tag.axis - 1)).expand(out.shape)
        for b, change in enumerate(moved):
            if change is not None:
                assert not (change & (owner != b)).any(), f"record {b} reaches rows of another"
    elif tag is None:
        assert not any(change is None or change.any() for change in moved), "records reach an untagged value"


DOUBLE = {"matmul const", "const matmul", "linear const", "conv const", "conv unbatched", "broadcast const"}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name):
    tag, out, moved = tag_and_influence(FOLLOWED[name])
    assert isinstance(tag, Rows), tag
    truthful(tag, out, moved)


@pytest.mark.parametrize("name", TREACHEROUS)
def test_never_wrong(name):
    try:
        result = tag_and_influence(TREACHEROUS[name])
    except sf.SfumatoError:
        return
    truthful(*result)


@pytest.mark.parametrize(
    "op", [lambda x: x.sum(), lambda x: x.mean(0), lambda x: x.sum((0, 1)) * 3 - 1, lambda x: -x.mean() / 2]
)
def test_sums_of_records_are_reduced(op):
    tag, *_ = tag_and_influence(op)
    assert isinstance(tag, Reduced)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.mean().exp(),
        lambda x: x.mean(0) ** 2,
        lambda x: x.sum() * x.mean(),
        lambda x: x.sum() / x.abs().sum(),
        lambda x: 1 / x.sum(),
        lambda x: x.prod(0),
        lambda x: x.amax(0),
    ],
)
def test_other_functions_of_sums_are_not(op):
    tag, *_ = tag_and_influence(op)
    assert tag is not None
    assert not isinstance(tag, (Reduced, Rows))


def test_random_programs_of_shape_operations():
    """Chains of shape operations, judged by influence."""
    torch.manual_seed(0)
    steps = [v for k, v in FOLLOWED.items() if k in (
        "transpose", "permute", "movedim", "mT", "swapaxes", "flatten", "unsqueeze", "repeat", "softmax", "cumsum", "sort", "flip", "roll", "slice", "none", "indices", "stack", "cat", "clone", "records by index",
    )]  # fmt: skip
    done = 0
    for _ in range(150):
        chain = [steps[int(k)] for k in torch.randint(0, len(steps), (3,))]

        def program(x, chain=chain):
            for step in chain:
                x = step(x) if x.dim() == 3 else x.flatten(0, x.dim() - 3) if x.dim() > 3 else x
            return x

        try:
            result = tag_and_influence(program)
        except (RuntimeError, IndexError, sf.SfumatoError):
            continue
        truthful(*result)
        done += isinstance(result[0], Rows)
    assert done > 50


def test_single_record_and_modules_agree():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU()).double()
    with sf.record(model) as tape:
        model(torch.randn(1, 5)).sum().backward()
    assert tape.sq_norms().shape == (1,)
