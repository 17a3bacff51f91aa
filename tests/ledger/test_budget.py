"""One budget for all who share a ledger: checked and charged in one transaction, spent fully, never exceeded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfumato.accounting import Budget, Event, Ledger, compose, max_steps
from sfumato.accounting.ledger_chain import Entry
from sfumato.errors import BudgetExceeded, ConfigurationError, LedgerError

EVENT = Event("poisson-gaussian", 1.1, 0.01, "add-remove")
OTHER = Event("gaussian", 3.0, 1.0, "add-remove")
BUDGET = Budget(0.8, 1e-5)


def spend(ledger: Ledger, event: Event = EVENT, **scope: object) -> int:
    for step in range(100_000):
        try:
            ledger.append(event, run="a", step=step, budget=BUDGET, **scope)  # type: ignore[arg-type]
        except BudgetExceeded:
            return step
    raise AssertionError("the budget never ends")


def test_the_budget_is_spent_fully_and_never_exceeded() -> None:
    with Ledger() as ledger:
        steps = spend(ledger)
        assert steps == max_steps({}, EVENT, epsilon=BUDGET.epsilon, delta=BUDGET.delta) == ledger.verify() > 10
        assert ledger.epsilon(delta=BUDGET.delta) <= BUDGET.epsilon
        assert compose({EVENT: steps + 1}, delta=BUDGET.delta) > BUDGET.epsilon


def test_what_others_spent_counts_and_what_other_records_spent_does_not() -> None:
    with Ledger() as ledger:
        ledger.append(OTHER, run="b", step=0, group="x")
        beside = max_steps({OTHER: 1}, EVENT, epsilon=BUDGET.epsilon, delta=BUDGET.delta)
        alone = max_steps({}, EVENT, epsilon=BUDGET.epsilon, delta=BUDGET.delta)
        assert beside == 0 < alone
        with pytest.raises(BudgetExceeded):
            ledger.append(EVENT, run="a", step=0, budget=BUDGET)
        assert spend(ledger, group="y") == alone
        assert ledger.events() == {OTHER: 1, EVENT: alone}
        assert sorted(map(len, ledger.spent())) == [1, 1]


def test_a_schedule_in_which_every_step_differs_stays_within_the_budget() -> None:
    schedule = [Event("gaussian", 40.0 - 0.1 * step, 1.0, "add-remove", sampler="shuffle") for step in range(200)]
    held: dict[Event, int] = {}
    with Ledger() as ledger:
        for step, event in enumerate(schedule):
            try:
                ledger.append(event, run="a", step=step, budget=BUDGET)
            except BudgetExceeded:
                break
            held[event] = 1
        assert ledger.events() == held
        assert compose(held, delta=BUDGET.delta) <= BUDGET.epsilon < compose({**held, event: 1}, delta=BUDGET.delta)
    assert len(held) > 3


def test_many_at_once_are_all_or_nothing() -> None:
    most = max_steps({}, EVENT, epsilon=BUDGET.epsilon, delta=BUDGET.delta)
    with Ledger() as ledger:
        with pytest.raises(BudgetExceeded):
            ledger.append(EVENT, run="a", step=0, count=most + 1, budget=BUDGET)
        assert ledger.verify() == 0
        ledger.append(EVENT, run="a", step=0, count=most, budget=BUDGET)
        assert ledger.events() == {EVENT: most}
        with pytest.raises(BudgetExceeded):
            ledger.append(EVENT, run="a", step=1, budget=BUDGET)
        ledger.append(EVENT, run="a", step=1)  # without a budget nothing is refused


@pytest.mark.parametrize("count", [0, -1, True, 1.0, 10**13])
def test_a_count_is_a_positive_integer(count: int) -> None:
    with Ledger() as ledger:
        with pytest.raises(ConfigurationError):
            ledger.append(EVENT, run="a", step=0, count=count)
        with pytest.raises(ConfigurationError):
            ledger.reserve(EVENT, count, run="a", step=0)
        with pytest.raises(ConfigurationError):
            ledger.append(EVENT, run="a", step=0, budget=0.8)  # type: ignore[arg-type]


def test_reserved_steps_are_charged_first_and_given_back_when_unused(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        reservation = ledger.reserve(EVENT, 50, run="a", step=3, dataset="d", records=[1, 2])
        assert (reservation.event, reservation.left, ledger.events()) == (EVENT, 50, {EVENT: 50})
        for _ in range(20):
            reservation.use()
        assert reservation.left == 30
        assert reservation.close() == 30
        assert reservation.close() == 0
        with pytest.raises(LedgerError, match="No reserved release"):
            reservation.use()
        assert [(e["count"], e["reservation"]) for e in ledger.entries()] == [(50, 1), (-30, 1)]
        assert ledger.events() == {EVENT: 20}
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.spent(dataset="d", records=[2]) == [{EVENT: 20}]
        assert ledger.spent(dataset="d", records=[3]) == [{}]


def test_a_reservation_takes_what_the_budget_has_left() -> None:
    most = max_steps({}, EVENT, epsilon=BUDGET.epsilon, delta=BUDGET.delta)
    with Ledger() as ledger:
        ledger.append(EVENT, run="a", step=0, count=most - 7)
        with ledger.reserve(EVENT, 50, run="a", step=1, budget=BUDGET) as reservation:
            assert reservation.left == 7
            with pytest.raises(BudgetExceeded):
                ledger.reserve(EVENT, 1, run="a", step=2, budget=BUDGET)
            for _ in range(7):
                reservation.use()
            with pytest.raises(LedgerError, match="No reserved release"):
                reservation.use()
        assert ledger.verify() == 1 + 1  # nothing was left to give back


def test_a_forked_child_can_neither_use_nor_give_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    reservation = ledger.reserve(EVENT, 5, run="a", step=0)
    child = os.fork()
    if child == 0:
        try:
            reservation.use()
        except LedgerError:
            os._exit(10 + reservation.close())
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10
    assert reservation.close() == 5
    assert ledger.events() == {}
    ledger.close()


@pytest.mark.parametrize(
    "forged",
    [
        {"count": -6},  # more than reserved
        {"count": -1, "event": "other"},
        {"count": -1, "run": "b"},
        {"count": -1, "group": "g"},
        {"count": -1, "reservation": 2},  # charged, not reserved
        {"count": -1, "reservation": None},
        {"count": 0},
        {"count": 1},
    ],
)
def test_only_what_was_reserved_can_be_given_back(tmp_path: Path, forged: dict[str, object]) -> None:
    """The entry is chained correctly, as only somebody with the code can; what it says is refused still."""
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.reserve(EVENT, 5, run="a", step=0)
    ledger.append(EVENT, run="a", step=1)
    text = ledger._store.execute("SELECT event FROM entries").fetchone()[0]
    if forged.get("event"):
        forged = forged | {"event": text.replace("1.1", "2.1")}
    entry = Entry(**({"seq": 3, "run": "a", "step": 0, "group": None, "dataset": None, "records": None, "note": "",
                      "event": text, "count": -5, "reservation": 1} | forged))  # fmt: skip  # type: ignore[arg-type]
    row = (*vars(entry).values(), entry.chained(ledger.head))
    ledger._store.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    ledger._store.execute("UPDATE meta SET value = ? WHERE key = 'head'", (row[-1],))
    with pytest.raises(LedgerError, match="entry 3 gives back what was not reserved"):
        ledger.verify()
    with pytest.raises(LedgerError, match="entry 3 gives back what was not reserved"):
        ledger.events()
    ledger._store.connection.close()
    with pytest.raises(LedgerError, match="entry 3 gives back what was not reserved"):
        Ledger(tmp_path / "ledger.db")


def test_a_reservation_is_given_back_once(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        reservation = ledger.reserve(EVENT, 5, run="a", step=0)
        reservation._give_back(2)
        with pytest.raises(LedgerError, match="entry 3 gives back what was not reserved; nothing was recorded"):
            reservation._give_back(2)  # twice, as no caller can
        assert ledger.events() == {EVENT: 3}
        assert ledger.verify() == 2


def test_an_interrupt_while_entries_are_counted_forgets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato.accounting.ledger_spent import Spending

    with Ledger() as ledger:
        for step in range(5):
            ledger.append(EVENT, run="a", step=step)
        add, calls = Spending.add, []

        def interrupted(self: Spending, *arguments: object) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            add(self, *arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Spending, "add", interrupted)
            ledger._chain, ledger._spending = type(ledger._chain)(), Spending()
            with pytest.raises(KeyboardInterrupt):
                ledger.events()
        assert ledger.events() == {EVENT: 5}


WORKER = """
import sys
from sfumato.accounting import Budget, Event, Ledger
from sfumato.errors import BudgetExceeded
event, budget = Event("poisson-gaussian", 1.1, 0.01, "add-remove"), Budget(float(sys.argv[3]), 1e-5)
done = 0
with Ledger(sys.argv[1]) as ledger:
    sys.stdin.readline()
    try:
        for step in range(100):
            ledger.append(event, run=sys.argv[2], step=step, budget=budget)
            done += 1
    except BudgetExceeded:
        pass
print(done)
"""


@pytest.mark.dist
@pytest.mark.parametrize("allowed", [200])
def test_six_processes_spend_one_budget_exactly(tmp_path: Path, allowed: int) -> None:
    epsilon = (float(compose({EVENT: allowed}, delta=1e-5)) + float(compose({EVENT: allowed + 1}, delta=1e-5))) / 2
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "ledger.db"), str(i), repr(epsilon)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(6)
    ]
    for child in children:  # every one is up and waiting, or will find the others at work
        child.stdin.write("\n")  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]
    done = [int(child.communicate(timeout=100)[0]) for child in children]
    assert sum(done) == allowed
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.verify() == allowed
        assert [sum(e["run"] == str(i) for e in ledger.entries()) for i in range(6)] == done
        assert ledger.epsilon(delta=1e-5) <= epsilon
