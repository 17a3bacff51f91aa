"""sf.rows: tokens without padding, several views of a record, batches of graphs in the private loop, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.oracle.oracle import agree
from tests.owners.graphs import GCN, Graph, collate, graph
from tests.step.harness import chosen, distance, mlp, norm, world
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import sfumato as sf

LENGTHS = [3, 1, 5, 2]
OWNER = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
PLACE = torch.cat([torch.arange(n) for n in LENGTHS])


def gradients(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    """{name: (B, *shape)}: the gradient of each of the losses."""
    names = [n for n, _ in model.named_parameters()]
    rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True, allow_unused=True) for v in losses]
    zeros = [torch.zeros_like(p) for p in model.parameters()]
    return {n: torch.stack([zeros[k] if row[k] is None else row[k] for row in rows]) for k, n in enumerate(names)}


class Tagger(nn.Module):
    """A label for each token: embedding, a sum over the sentence given back to its tokens, a head."""

    def __init__(self, through_checkpoint: bool = False) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        self.through_checkpoint = through_checkpoint

    def forward(self, ids: Tensor, owner: Tensor) -> Tensor:
        h = self.norm(self.embed(ids))
        h = checkpoint(self.mix, h, use_reentrant=False).tanh() if self.through_checkpoint else self.mix(h).tanh()
        around = torch.zeros(4, 4, dtype=h.dtype).index_add(0, owner, h)
        return self.out(h + around[owner])


class Padded(nn.Module):
    """Tokens without padding, put into a padded block for attention and taken out again; pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(9, 4), nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, ids: Tensor, owner: Tensor, place: Tensor) -> Tensor:
        size = int(owner.max()) + 1
        qkv = self.qkv(self.embed(ids))
        block = qkv.new_zeros(size, 5, 12)
        block[owner, place] = qkv
        mask = torch.zeros(size, 5, dtype=torch.bool)
        mask[owner, place] = True
        q, k, v = block.chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))[owner, place]
        count = torch.bincount(owner, minlength=size).unsqueeze(1)
        return self.out(
            torch.zeros(size, 4, dtype=attended.dtype).scatter_add_(0, owner[:, None].expand(-1, 4), attended) / count
        )


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 9, (len(OWNER),), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", ["in a row", "shuffled"])
@pytest.mark.parametrize("through_checkpoint", [False, True])
def test_tokens_with_a_label_each(ids: Tensor, order: str, through_checkpoint: bool) -> None:
    torch.manual_seed(0)
    model, labels = Tagger(through_checkpoint).double(), torch.arange(len(OWNER)) % 3
    owner = OWNER if order == "in a row" else OWNER[torch.randperm(len(OWNER))]
    each = F.cross_entropy(model(ids, owner), labels, reduction="none")
    want = gradients(model, [each[owner == b].sum() for b in range(4)])
    with sf.record(model, loss_reduction="sum") as tape:
        with sf.rows(owner):
            value = F.cross_entropy(model(ids, owner), labels, reduction="sum")
        value.backward()
    agree(tape, want, 1e-9)


def test_tokens_through_a_padded_block(ids: Tensor) -> None:
    torch.manual_seed(0)
    model, labels = Padded().double(), torch.tensor([0, 1, 2, 1])
    want = gradients(model, list(F.cross_entropy(model(ids, OWNER, PLACE), labels, reduction="none")))
    with sf.record(model) as tape, sf.rows(OWNER):
        F.cross_entropy(model(ids, OWNER, PLACE), labels).backward()
    agree(tape, want, 1e-9)


LAYOUTS: dict[str, Callable[[], tuple[Any, Tensor]]] = {
    "views": lambda: (sf.rows(views=3), torch.arange(4).repeat_interleave(3)),
    "the same as an owner": lambda: (
        sf.rows(torch.arange(4).repeat_interleave(3)),
        torch.arange(4).repeat_interleave(3),
    ),
    "one after the other": lambda: (sf.rows(torch.arange(4).repeat(3)), torch.arange(4).repeat(3)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["mlp", "lstm", "multi_dot"])
def test_views_of_a_record_are_clipped_once(kind: str, layout: str, reduction: Any) -> None:
    class Chain(nn.Module):
        """On a lower tier."""

        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.multi_dot([x, self.u, self.v])

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(1, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x.unsqueeze(2))[0][:, -1]

    torch.manual_seed(0)
    model = {"mlp": mlp, "lstm": Recurrent, "multi_dot": Chain}[kind]().double()
    declared, owner = LAYOUTS[layout]()
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randint(0, 3, (12,))
    each = F.cross_entropy(model(x), y, reduction="none")
    scale = 3 if reduction == "mean" else 1
    want = gradients(model, [each[owner == b].sum() / scale for b in range(4)])
    if kind == "multi_dot" and layout == "one after the other":  # a lower tier needs the rows of a record in one block
        with pytest.raises(sf.errors.UnsupportedError), sf.record(model, loss_reduction=reduction), declared:
            model(x)
        return
    with sf.record(model, loss_reduction=reduction) as tape, declared:
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    agree(tape, want, 1e-9)


def test_views_pooled_inside_the_model() -> None:
    torch.manual_seed(0)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(7, 3)

        def forward(self, x: Tensor, extra: Tensor) -> Tensor:
            return self.b(torch.cat([self.a(x).tanh().view(4, 3, 4).mean(1), extra], 1))

    model, x, extra = Pooled().double(), torch.randn(12, 5).double(), torch.randn(4, 3).double()
    y = torch.tensor([0, 1, 2, 1])
    want = gradients(model, list(F.cross_entropy(model(x, extra), y, reduction="none")))
    with sf.record(model) as tape, sf.rows(views=3, records=4):
        F.cross_entropy(model(x, extra), y).backward()
    agree(tape, want, 1e-9)


def test_views_on_another_axis_than_the_first() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0][-1])

    torch.manual_seed(0)
    model, x, y = Steps().double(), torch.randn(5, 6, 3).double(), torch.randint(0, 2, (6,))
    each = F.cross_entropy(model(x), y, reduction="none")
    with sf.record(model, batch_dim=1) as tape, sf.rows(views=2):
        F.cross_entropy(model(x), y).backward()
    agree(tape, gradients(model, [each[2 * b : 2 * b + 2].mean() for b in range(3)]), 1e-9)


# ------------------------------------------------------------------------------------------- in the private loop


class Graphs(Dataset[Graph]):
    def __init__(self, items: list[Graph]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Graph:
        return self.items[i]


@pytest.mark.parametrize("users", [None, [0, 1, 0, 2, 1, 0, 3]])
@pytest.mark.parametrize("physical", [None, 2])
def test_private_training_on_graphs_clips_each_graph_or_user(physical: int | None, users: list[int] | None) -> None:
    items = [graph(2 + k % 5, 3 * k, k) for k in range(7)]
    units = list(range(7)) if users is None else users
    torch.manual_seed(0)
    model, engine = GCN().double(), sf.PrivacyEngine()
    names = [n for n, _ in model.named_parameters()]
    want: dict[str, Tensor] = {}
    for unit in set(units):
        value = torch.zeros(())
        for b in (collate([g]) for g, u in zip(items, units, strict=True) if u == unit):
            value = value + F.cross_entropy(model(b.x, b.edge_index, b.weight, b.batch, 1), b.y)
        grads = dict(zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True))
        for n, v in grads.items():
            want[n] = want.get(n, 0) + v * min(1.0, 0.1 / norm(grads))
    _, _, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(Graphs(items), batch_size=7, collate_fn=collate),
        noise_multiplier=0.0,
        max_grad_norm=0.1,
        noise=chosen(len(set(units))),
        max_physical_batch_size=physical,
        privacy_unit=users,
    )
    for b in loader:
        with sf.rows(b.batch, inputs=b.inputs):
            value = F.cross_entropy(model(b.x, b.edge_index, b.weight, b.batch, len(b.y)), b.y)
        value.backward()
    got = {n: p.grad * engine.plan.expected_batch_size for n, p in model.named_parameters() if p.grad is not None}
    assert distance(got, want) <= 1e-9


def test_one_record_with_many_views_moves_the_sum_by_at_most_the_bound() -> None:
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(4, 8, 5), torch.zeros(4).long()
    sums = []
    for taken in (None, [0, 1, 3]):
        w = world(
            model, (x, y), noise=chosen(4, taken), batch_size=4, sampling=sf.Poisson(1 - 1e-10),
            noise_multiplier=0.0, max_grad_norm=0.05,
        )  # fmt: skip
        for xs, ys in w.loader:
            with sf.rows(views=8):
                F.cross_entropy(model(xs.flatten(0, 1)), ys.repeat_interleave(8)).backward()
        sums.append({n: g * 4 for n, g in w.grads.items()})
        w.engine.detach()
        model.zero_grad()
    assert 0 < distance(*sums) <= 0.05 * (1 + 1e-6)


# ---------------------------------------------------------------------------------------------------- refusals


def run(model: Any, declared: Any, *inputs: Tensor, reduction: Any = "mean", records: int | None = None) -> None:
    with sf.record(model, loss_reduction=reduction), declared:
        out = model(*inputs)
        (out.mean() if reduction == "mean" else out.sum()).backward()


class Body(nn.Module):
    def __init__(self, body: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Linear(2, 2), nn.Linear(2, 2), body

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        return self.b(self.body(self.a(x), batch))


BATCH = torch.tensor([0, 0, 1, 1, 1])
MIXING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "an edge between records": lambda h, b: h + h[torch.tensor([4, 1, 2, 3, 0])],
    "an edge between records, as the records say": lambda h, b: h + h[b],
    "messages to other records": lambda h, b: torch.zeros(5, 2).index_add(0, torch.tensor([4, 1, 2, 3, 0]), h),
    "all nodes into one row": lambda h, b: torch.zeros(2, 2).index_add(0, torch.zeros(5).long(), h),
    "pooled into the wrong record": lambda h, b: torch.zeros(2, 2).index_add(0, 1 - b, h),
    "pooled, turned round": lambda h, b: torch.zeros(2, 2).index_add(0, b, h).flip(0)[b],
    "scattered by column": lambda h, b: torch.zeros(2, 2).scatter_add(0, torch.tensor([[0, 1]] * 5), h),
    "mean over all nodes": lambda h, b: h - h.mean(0),
    "in place, after pooling": lambda h, b: (
        torch.zeros(2, 2).index_add_(0, b, h).index_add_(0, torch.zeros(5).long(), h)
    ),
    "put elsewhere": lambda h, b: torch.zeros(2, 3, 2).index_put((1 - b, torch.tensor([0, 1, 0, 1, 2])), h)[:, 0],
    "segments of another cut": lambda h, b: torch.segment_reduce(h, "sum", lengths=torch.tensor([3, 2]), axis=0),
    "softmax over all nodes": lambda h, b: h.softmax(0),
    "rows that records picked among others'": lambda h, b: torch.zeros(2, 2).index_add(0, torch.zeros(5).long(), h[b]),
    "selected among others'": lambda h, b: torch.zeros(2, 2).index_add(0, torch.zeros(5).long(), h.index_select(0, b)),
    "added to the pool of another": lambda h, b: torch.zeros(2, 2).index_add(0, b, h).index_add(0, 1 - b, h),
    "the last on its own place": lambda h, b: torch.zeros(2, 2).index_add(0, torch.tensor([1, 0, 1, 1, 1]), h),
    "sorted": lambda h, b: h.sort(0).values,
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MIXING)
def test_rows_of_different_records_may_not_meet(name: str, reduction: Any) -> None:
    with pytest.raises(sf.errors.UnsupportedError):
        run(Body(MIXING[name]), sf.rows(BATCH), torch.randn(5, 2), BATCH, reduction=reduction)


def test_the_same_models_pass_where_the_rows_are_of_one_record() -> None:
    """The refusals above have power: nothing but the records is wrong with these."""
    for name in ("an edge between records", "an edge between records, as the records say", "messages to other records"):
        run(
            Body(MIXING[name]),
            sf.rows(torch.zeros(5).long()),
            torch.randn(5, 2),
            torch.zeros(5).long(),
            reduction="sum",
        )


def test_unequal_rows_leave_under_a_sum_only() -> None:
    model = Body(lambda h, b: h)
    run(model, sf.rows(BATCH), torch.randn(5, 2), BATCH, reduction="sum")
    with pytest.raises(sf.errors.CoupledRecords, match="loss_reduction='sum'"):
        run(model, sf.rows(BATCH), torch.randn(5, 2), BATCH)


def test_rows_leave_in_the_declared_order_only() -> None:
    with pytest.raises(sf.errors.CoupledRecords, match="order"):
        run(
            Body(lambda h, b: h[torch.tensor([2, 1, 0, 3, 4])]),
            sf.rows(BATCH),
            torch.randn(5, 2),
            BATCH,
            reduction="sum",
        )


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "another number of rows": (lambda: sf.rows(BATCH[:4]), "neither a row"),
    "owners beyond the batch": (lambda: sf.rows(BATCH, records=1), "An owner is 1"),
    "a name the model does not know": (lambda: sf.rows(BATCH, inputs={"nodes": BATCH}), "nodes"),
    "the wrong axis": (lambda: sf.rows(BATCH, inputs={"x": (BATCH, 1)}), "axis 1"),
    "no input with records": (lambda: sf.rows(inputs={"x": None, "batch": None}), "no input"),
    "ambiguous": (lambda: sf.rows(BATCH, records=5), "ambiguous"),
    "not so many views": (lambda: sf.rows(views=2), "views"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_declaration_that_does_not_fit_is_refused(name: str) -> None:
    build, says = MISFITS[name]
    with pytest.raises(sf.errors.RowsMismatch, match=says):
        run(Body(lambda h, b: h), build(), torch.randn(5, 2), BATCH, reduction="sum")


@pytest.mark.parametrize(
    "build",
    [
        lambda: sf.rows(),
        lambda: sf.rows(BATCH, views=2),
        lambda: sf.rows(views=0),
        lambda: sf.rows(torch.tensor([0.0, 1.0])),
        lambda: sf.rows(torch.tensor([[0, 1]])),
        lambda: sf.rows(torch.tensor([True, False])),
        lambda: sf.rows(torch.tensor([0, -1])),
        lambda: sf.rows([0, 1]),
        lambda: sf.rows(BATCH, inputs={"x": (BATCH, -1)}),
        lambda: sf.rows(BATCH, records=0),
    ],
)
def test_bad_arguments(build: Callable[[], object]) -> None:
    with pytest.raises(sf.errors.ConfigurationError):
        build()


def test_no_declaration_inside_another() -> None:
    with sf.rows(BATCH), pytest.raises(sf.errors.PrivacyError, match="inside"), sf.rows(BATCH):
        pass
    with sf.rows(BATCH):  # and the failed one left nothing behind
        pass


def test_more_rows_than_records_need_a_declaration() -> None:
    w = world(mlp(), (torch.randn(6, 5), torch.zeros(6).long()), everybody=True)
    for x, y in w.loader:
        with pytest.raises(sf.errors.RowsMismatch):
            w.model(x.repeat(2, 1))
        F.cross_entropy(w.model(x), y).backward()


def test_the_declaration_must_be_of_the_batch_that_was_drawn() -> None:
    w = world(mlp(), (torch.randn(6, 5), torch.zeros(6).long()), everybody=True)
    for x, y in w.loader:
        with sf.rows(torch.arange(7)), pytest.raises(sf.errors.RowsMismatch, match="An owner is 6"):
            w.model(torch.randn(7, 5))
        F.cross_entropy(w.model(x), y).backward()


def test_as_many_rows_as_records_must_be_named() -> None:
    owner, x = torch.tensor([1, 2, 0]), torch.randn(3, 2)
    model = Body(lambda h, b: torch.zeros(3, 2).index_add(0, b, h))
    with pytest.raises(sf.errors.RowsMismatch, match="ambiguous"):
        run(model, sf.rows(owner), x, owner)
    want = gradients(model, list(model(x, owner).sum(1)))
    with sf.record(model) as tape, sf.rows(inputs={"x": owner, "batch": owner}):
        model(x, owner).sum(1).mean().backward()
    agree(tape, want, 1e-5)


def test_a_tie_that_cannot_be_broken_is_refused() -> None:
    """Three nodes, three records, one without a node: is the sum a row for each node or for each record?"""
    owner = torch.tensor([0, 0, 2])
    model = Body(lambda h, b: torch.zeros(3, 2).index_add(0, b, h))
    with pytest.raises(sf.errors.CoupledRecords, match="By chance"):
        run(model, sf.rows(inputs={"x": owner, "batch": owner}, records=3), torch.randn(3, 2), owner)
