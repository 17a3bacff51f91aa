"""ε of a ledger is that of its worst record: what it shares adds up, what it does not is not charged to it."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sfumato.accounting import Event, Ledger, compose
from sfumato.accounting import ledger_spent as spent_module
from sfumato.accounting.ledger_scope import Records
from sfumato.errors import ConfigurationError, LedgerError

DELTA = 1e-5
ROUND = Event("poisson-gaussian", 1.0, 0.05, "add-remove")
KINDS = [Event("poisson-gaussian", 1.0 + i / 10, 0.01, "add-remove") for i in range(4)]


def rounds(members: list[list[int]]) -> float:
    """Ten rounds of 20 steps, each on the records numbered in ``members``."""
    with Ledger() as ledger:
        for i, numbers in enumerate(members):
            ledger.append(ROUND, run=f"round {i}", step=0, count=20, dataset="d", records=numbers)
        return float(ledger.epsilon(delta=DELTA))


def test_ten_rounds_on_the_same_on_disjoint_and_on_mixed_records() -> None:
    """Values of an independent accountant for q = 0.05, σ = 1, δ = 1e-5: 20, 40, 60, 100 and 200 steps."""
    assert rounds([[1, 2, 3]] * 10) == pytest.approx(4.77, abs=0.005)
    assert rounds([[i, 100 + i] for i in range(10)]) == pytest.approx(1.99, abs=0.005)
    for times, expected in ((2, 2.47), (3, 2.86), (5, 3.50)):
        # Record 0 is in some rounds, and everybody else in one.
        assert rounds([[i + 1, 0] if i < times else [i + 1] for i in range(10)]) == pytest.approx(expected, abs=0.005)


def test_groups_are_disjoint_and_whoever_names_nothing_touches_all() -> None:
    with Ledger() as ledger:
        for i in range(10):
            ledger.append(ROUND, run="a", step=i, count=20, group=f"shard {i}")
        assert ledger.epsilon(delta=DELTA) == pytest.approx(1.99, abs=0.005)
        assert ledger.events() == {ROUND: 20}
        ledger.append(ROUND, run="b", step=0, count=20)
        assert ledger.events() == ledger.events(group="shard 3") == {ROUND: 40}
        assert ledger.events(group="another") == {ROUND: 20}


def test_what_is_not_related_adds_up() -> None:
    a, b, c, d = KINDS
    with Ledger() as ledger:
        ledger.append(a, run="r", step=0, dataset="one", group="g")
        ledger.append(b, run="r", step=1, dataset="one", records=[5])  # 5 may be in g
        ledger.append(c, run="r", step=2, dataset="two")  # and in the other data set
        ledger.append(d, run="r", step=3, group="g")  # and in g of the data set without a name
        assert ledger.spent() == [{a: 1, b: 1, c: 1, d: 1}]
        assert ledger.events(dataset="one", records=[6]) == {a: 1, c: 1, d: 1}
        assert ledger.events(dataset="one", group="h") == {b: 1, c: 1, d: 1}
        assert ledger.events(group="h") == {a: 1, b: 1, c: 1}
        assert ledger.events(dataset="two", group="h") == {a: 1, b: 1, c: 1, d: 1}


def test_an_entry_for_numbers_within_a_group_touches_those_in_both() -> None:
    a, b = KINDS[:2]
    with Ledger() as ledger:
        ledger.append(a, run="r", step=0, dataset="d", group="g", records=[1, 2])
        ledger.append(b, run="r", step=1, dataset="d", group="h", records=[2, 3])
        assert sorted(map(str, ledger.spent())) == sorted(map(str, [{a: 1}, {b: 1}]))
        assert ledger.spent(dataset="d", group="g", records=[3]) == [{}]
        assert ledger.events(dataset="d", records=[1]) == {a: 1}
        assert ledger.events(dataset="d", group="h", records=[1, 3]) == {b: 1}


def test_what_is_given_back_may_make_another_record_the_worst() -> None:
    with Ledger() as ledger:
        ledger.append(ROUND, run="a", step=0, count=4, group="x")
        reservation = ledger.reserve(ROUND, 5, run="a", step=1, group="y")
        ledger.append(ROUND, run="a", step=2, group="z")
        assert ledger.spent() == [{ROUND: 5}]
        for _ in range(2):
            reservation.use()
        assert reservation.close() == 3
        assert ledger.spent() == [{ROUND: 4}]
        assert ledger.spent(group="y") == [{ROUND: 2}]


def by_record(entries: list[tuple[Event, int, dict[str, object]]], size: int) -> list[Counter[Event]]:
    """The definition, record by record: every combination of a group and a number in each of two data sets."""
    found = []
    groups = [None, "x", "y"]
    for places in itertools.product(itertools.product(groups, range(size)), repeat=2):
        place = dict(zip(("one", "two"), places, strict=True))
        for unnamed in groups:
            total: Counter[Event] = Counter()
            for event, count, scope in entries:
                group, number = place.get(scope.get("dataset"), (unnamed, None))  # type: ignore[arg-type]
                in_group = scope.get("group") in (None, group)
                numbers = scope.get("records")
                if in_group and (numbers is None or number in numbers):  # type: ignore[operator]
                    total[event] += count
            found.append(total)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_random_scopes_agree_with_the_definition_after_every_entry(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, entries = 4, []
    scope: dict[str, object] = {}
    with Ledger() as ledger:
        for step in range(12):
            if rng.random() < 0.7:  # else a run goes on with the scope it has
                scope = {"dataset": [None, "one", "two"][rng.integers(3)], "group": [None, "x", "y"][rng.integers(3)]}
                if scope["dataset"] and rng.random() < 0.6:
                    scope["records"] = rng.choice(size - 1, size=rng.integers(1, size), replace=False).tolist()
            event, count = KINDS[rng.integers(3)], int(rng.integers(1, 4))
            if rng.random() < 0.3:
                reservation = ledger.reserve(event, count + 2, run="r", step=step, **scope)  # type: ignore[arg-type]
                for _ in range(count):
                    reservation.use()
                if rng.random() < 0.5:
                    ledger.spent()
                assert reservation.close() == 2
            else:
                ledger.append(event, run="r", step=step, count=count, **scope)  # type: ignore[arg-type]
            entries.append((event, count, scope))
            truth = by_record(entries, size)
            answer = ledger.spent()
            assert all(any(total <= Counter(held) for held in answer) for total in truth)  # nobody is forgotten
            assert all(any(Counter(held) <= total for total in truth) for held in answer)  # nobody is invented
            asked = {"dataset": "one", "group": "x", "records": [0, 1]}
            members = by_record([(e, n, s) for e, n, s in entries], size)
            members = [
                total
                for total, ((place, _), _) in zip(
                    members,
                    itertools.product(
                        itertools.product(itertools.product([None, "x", "y"], range(size)), repeat=2), "abc"
                    ),
                    strict=True,
                )
                if place[0] == "x" and place[1] in (0, 1)
            ]
            answer = ledger.spent(**asked)  # type: ignore[arg-type]
            assert all(any(total <= Counter(held) for held in answer) for total in members)
            assert all(any(Counter(held) <= total for total in members) for held in answer)


@pytest.mark.parametrize("limit", ["MOST_ROWS", "MOST_CELLS"])
def test_past_its_limits_the_answer_is_an_upper_bound(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spent_module, limit, 2)
    rng = np.random.default_rng(0)
    with Ledger() as ledger:
        totals = [Counter[Event]() for _ in range(20)]
        for step in range(30):
            event, numbers = KINDS[step % 4], rng.choice(20, size=5, replace=False)
            ledger.append(event, run="r", step=step, dataset="d", records=numbers)
            for number in numbers:
                totals[number][event] += 1
        answer = ledger.spent()
    assert len(answer) <= 2
    assert all(any(total <= Counter(held) for held in answer) for total in totals)


def test_a_scope_outlives_the_process_and_is_kept_once(tmp_path: Path) -> None:
    path, numbers = tmp_path / "ledger.db", Records(range(0, 100_000, 3))
    with Ledger(path) as ledger:
        for step in range(50):
            ledger.append(ROUND, run="a", step=step, dataset="d", records=numbers)
    assert path.stat().st_size < 120_000
    with Ledger(path) as ledger:
        ledger.append(ROUND, run="a", step=50, dataset="d", records=[1])
        assert ledger.spent(dataset="d", records=[1]) == [{ROUND: 1}]
        assert ledger.spent() == [{ROUND: 50}]
        assert ledger.entries()[0]["records"] == numbers.digest


@pytest.mark.parametrize(
    "numbers",
    [[0], [2**31 - 1], [0, 2**31 - 1], list(range(1000)), [1, 2, 3, 7, 8, 2_000_000], list(range(0, 999, 7))],
)
def test_record_numbers_survive_their_encoding(numbers: list[int]) -> None:
    held = Records([*numbers, numbers[0]])
    back = Records.decode(held.encode())
    assert back.numbers.tolist() == numbers
    assert back.digest == held.digest == Records(np.array(numbers[::-1])).digest


def test_record_numbers_read_as_ranges() -> None:
    assert Records([3, 1, 2, 9, 5, 6]).ranges() == "1-3,5-6,9"


@pytest.mark.parametrize(
    "scope",
    [
        {"records": [1]},
        {"dataset": "d", "records": []},
        {"dataset": "d", "records": [-1]},
        {"dataset": "d", "records": [2**31]},
        {"dataset": "d", "records": [[1]]},
        {"dataset": "d", "records": [[1], [1, 2]]},
        {"dataset": "d", "records": "12"},
        {"dataset": "d", "records": [0.5]},
        {"dataset": "d", "records": [True, False]},
        {"dataset": ""},
        {"dataset": 3},
        {"group": ""},
    ],
)
def test_a_scope_that_names_nobody_or_cannot_be_read_is_refused(scope: dict[str, object]) -> None:
    with Ledger() as ledger:
        with pytest.raises(ConfigurationError):
            ledger.append(ROUND, run="a", step=0, **scope)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError):
            ledger.epsilon(delta=DELTA, **scope)  # type: ignore[arg-type]
        assert ledger.verify() == 0


def test_replaced_records_are_not_mixed_with_added_ones() -> None:
    replaced = Event("poisson-gaussian", 1.0, 0.05, "replace-one")
    with Ledger() as ledger:
        ledger.append(ROUND, run="a", step=0, group="x")
        with pytest.raises(LedgerError, match="replace-one"):
            ledger.append(replaced, run="a", step=1, group="y")
        assert ledger.append(Event("gaussian", 1.0, 1.0, "zero-out"), run="a", step=2) == 2
    with Ledger() as ledger:
        ledger.append(replaced, run="a", step=0)
        with pytest.raises(LedgerError, match="replace-one"):
            ledger.append(ROUND, run="a", step=1)


def test_ten_thousand_rounds_of_subsets_are_exact() -> None:
    """Counts are one per record, so many overlapping subsets cost no more than the records they name."""
    rng = np.random.default_rng(1)
    size, times = 100_000, np.zeros(100_000, int)
    held = spent_module.Spending()
    for i in range(1000):
        numbers = Records(rng.integers(0, size, 5000))
        held.sets[numbers.digest] = numbers
        held.add(spent_module.Scope("d", None, numbers.digest), KINDS[0], 1)
        times[numbers.numbers] += 1
        if i % 250 == 0:
            assert max(c[KINDS[0]] for c in held.candidates()) == times.max()
    assert held.candidates() == [{KINDS[0]: times.max()}]


def test_epsilon_is_that_of_the_worst_candidate() -> None:
    strong, weak = Event("gaussian", 1.0, 1.0, "add-remove"), Event("gaussian", 4.0, 1.0, "add-remove")
    with Ledger() as ledger:
        ledger.append(strong, run="a", step=0, group="x")
        ledger.append(weak, run="a", step=1, count=3, group="y")
        worst, least = compose({strong: 1}, delta=DELTA), compose({weak: 3}, delta=DELTA)
        assert ledger.epsilon(delta=DELTA) == worst > least
        assert ledger.epsilon(delta=DELTA, group="y") == least
