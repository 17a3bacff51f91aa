"""The durable record of every release: written before the release, never changed afterwards."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from ..errors import BudgetExceeded, ConfigurationError, LedgerError
from .budget import Budget
from .events import Event
from .ledger_budget import Room
from .ledger_chain import COLUMNS, MOST_RELEASES, Broken, Chain, Entry, canonical
from .ledger_file import FORMAT, GENESIS, VERSION
from .ledger_reservation import Reservation, uncopied
from .ledger_scope import Records, Scope, scoped
from .ledger_spent import Spending
from .ledger_store import Store
from .pld import Epsilon, compose

Numbers = Sequence[int] | np.ndarray[Any, np.dtype[Any]] | Records
MOST_ANSWERS = 4096


class Ledger:
    """An append-only, hash-chained list of events in one SQLite file, or in memory when ``path`` is None.

    Guarantee: once :meth:`append` returns, the entry survives a crash of the process, of the machine, and of any
    other process that shares the file; an append that is cut short leaves no trace or a complete entry. Appending
    before releasing therefore never undercounts. Usable from every thread; in a forked child it must be opened anew.

    An entry may name the records that it may have touched: by privacy group, data set, or record numbers of that data
    set. :meth:`epsilon` is the worst over records: sequential composition on shared records, parallel on disjoint ones
    (McSherry, 2009). That holds if the records were chosen without looking at their content.

    Opening verifies the whole chain, and that no byte changed since the file was closed (its seal, ``PATH.seal``).
    Both find damage and edits, not a forger who rewrites all of it or restores an old copy: keep :attr:`head` elsewhere
    (a checkpoint) and pass it as ``head`` to find those. The file belongs on a local disk (SQLite WAL), mode 0600.
    Raises ``LedgerError`` if the folder is missing, the file is not an intact ledger of this version or lacks ``head``.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, head: str | None = None) -> None:
        self.path = None if path is None else Path(path).absolute()
        self._store = Store(self.path, may_create=head in (None, GENESIS))
        # What this object has seen: entries never change, so only new ones are read.
        self._chain, self._spending, self._torn = Chain(), Spending(), False
        self._written: Records | None = None  # spares decoding what was just encoded
        self._room = Room()
        self._answers: dict[tuple[frozenset[tuple[Event, int]], float], Epsilon] = {}
        try:
            if self.path is not None:
                self.verify()
            if head is not None:
                self.require(head)
        except BaseException:
            self._store.close(seal=False)
            raise

    def append(
        self,
        event: Event,
        *,
        run: str,
        step: int,
        group: str | None = None,
        dataset: str | None = None,
        records: Numbers | None = None,
        note: str = "",
        count: int = 1,
        budget: Budget | None = None,
        fits_at: str | None = None,
    ) -> int:
        """Write one entry for ``count`` releases durably and return its number (1, 2, …). Processes take turns.

        Args:
            group, dataset, records: the records it may touch; nothing given: anyone. ``records`` are numbers within
                ``dataset``: a 1-D list or array of integers, or :class:`Records`, which are sorted and hashed once.
            budget: what these records may be charged in all. The check and the write are one transaction, so runs that
                share the file never exceed it together.

            fits_at: a :attr:`head` after which the caller has found this entry to be within ``budget``; the check is
                made only if the ledger has moved on since.

        Raises ``ConfigurationError`` for a bad argument, ``BudgetExceeded``, and ``LedgerError`` if the entry could not
        be made durable, or protects another unit than those before it; nothing was written then, and nothing may be
        released.
        """
        scope, held = scoped(group, dataset, records)
        return self._charge(event, count, count, run, step, note, scope, held, budget, fits_at, reserve=False)[0]

    def reserve(
        self,
        event: Event,
        count: int,
        *,
        run: str,
        step: int,
        group: str | None = None,
        dataset: str | None = None,
        records: Numbers | None = None,
        note: str = "",
        budget: Budget | None = None,
    ) -> Reservation:
        """Charge ``count`` releases with one durable write, or as many of them as ``budget`` allows, at least one.

        Arguments and errors are those of :meth:`append`. A crash keeps all of them charged;
        :meth:`Reservation.close` gives back what was not used.
        """
        scope, held = scoped(group, dataset, records)
        seq, granted = self._charge(event, count, 1, run, step, note, scope, held, budget, None, reserve=True)

        def give_back(unused: int) -> None:
            with self._store.guarded(), self._store.transaction():
                self._catch_up()
                self._store.about_to_change()
                self._insert(event, -unused, run, step, "not used", scope, seq)

        return Reservation(event, seq, granted, give_back)

    def spent(
        self, *, group: str | None = None, dataset: str | None = None, records: Numbers | None = None
    ) -> list[dict[Event, int]]:
        """What a record of this scope may have been charged: no such record exceeds all of these; ``[{}]`` if nothing.

        How data sets overlap, and how groups and record numbers do, is not known: every combination counts. Groups of
        one data set are disjoint, record numbers exact; beyond 128 candidates the rest is joined in an upper bound.
        """
        scope, held = scoped(group, dataset, records)
        with self._store.guarded():
            with self._store.transaction("DEFERRED"):
                self._catch_up()
            return self._spending.candidates(scope, held)

    def events(
        self, group: str | None = None, dataset: str | None = None, records: Numbers | None = None
    ) -> dict[Event, int]:
        """Return {event: the most that any one record (of this scope) may have been charged of it}."""
        most: dict[Event, int] = {}
        for counts in self.spent(group=group, dataset=dataset, records=records):
            for event, count in counts.items():
                most[event] = max(count, most.get(event, 0))
        return most

    def epsilon(
        self, *, delta: float, group: str | None = None, dataset: str | None = None, records: Numbers | None = None
    ) -> Epsilon:
        """Return the certified epsilon at ``delta`` of everything recorded, for the worst record (of this scope)."""
        spent = self.spent(group=group, dataset=dataset, records=records)
        return max(self._composed(counts, delta) for counts in spent)

    def entries(self) -> list[dict[str, Any]]:
        """Return every entry, oldest first: seq, run, step, group, dataset, records (a digest), note, event (a dict),
        count (below 0: given back), reservation (the entry that reserved it, or None) and hash."""
        names = [name.strip('"') for name in COLUMNS.split(", ")]
        with self._store.guarded():
            rows = self._store.execute(f"SELECT {COLUMNS}, hash FROM entries ORDER BY seq").fetchall()
        found = [dict(zip((*names, "hash"), row, strict=True)) for row in rows]
        return [entry | {"event": json.loads(entry["event"])} for entry in found]

    def verify(self) -> int:
        """Recompute the whole chain and return the number of entries; ``LedgerError`` names the first bad one."""
        with self._store.guarded(), self._store.transaction():
            self._store.check()
            self._catch_up()
            chain = Chain()
            named = {self._followed(chain, row)[0].records for row in self._rows(0)} - {None}
            stored = {digest for (digest,) in self._store.execute("SELECT digest FROM scopes")}
            if stored != named:
                raise self._store.damaged("record numbers are kept that no entry names", sorted(stored - named))
            for digest in stored:
                self._numbers(digest)
            return chain.seq

    @property
    def head(self) -> str:
        """The hash of the last entry (64 zeros when empty); it commits to the entire history."""
        with self._store.guarded(), self._store.transaction("DEFERRED"):
            self._catch_up()
            return self._chain.head

    def contains(self, head: str) -> bool:
        """Whether ``head`` is, or once was, the :attr:`head` of this ledger."""
        with self._store.guarded():
            found = self._store.execute("SELECT 1 FROM entries WHERE hash = ?", (head,)).fetchone()
        return head == GENESIS or found is not None

    def require(self, head: str) -> None:
        """Raise ``LedgerError`` unless this ledger :meth:`contains` ``head``."""
        if not self.contains(head):
            raise LedgerError(
                f"ledger {self._store.where} does not hold entry {head!r}, which was kept outside it: it is another "
                "ledger or an older copy, and what was spent since would be forgotten.",
                found=head,
                where=self._store.where,
                fix="open the ledger that the run wrote.",
            )

    def export(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Return the whole ledger as a JSON-able document and, given ``path``, write it there (a new file, mode 0600).

        Keys: format, schema, head, entries (as :meth:`entries`) and scopes ({digest: record numbers, "0-99,105"}). The
        same ledger gives the same bytes. Raises ``LedgerError`` if it is damaged or the file cannot be written.
        """
        self.verify()
        entries = self.entries()
        digests = sorted({entry["records"] for entry in entries} - {None})
        with self._store.guarded():
            scopes = {digest: self._numbers(digest).ranges() for digest in digests}
        head = entries[-1]["hash"] if entries else GENESIS
        document = {"format": FORMAT, "schema": VERSION, "head": head, "entries": entries, "scopes": scopes}
        if path is not None:
            try:
                with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                    file.write(json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except (OSError, ValueError) as error:
                raise LedgerError(
                    f"ledger {self._store.where} cannot be exported to {path}: {error}.",
                    found=str(path),
                    where=str(path),
                    fix="name a new file in a writable folder.",
                ) from error
        return document

    def pseudonym(self, text: str) -> str:
        """A name for ``text`` that this ledger alone can make: a hash of records must not be one that others can check.

        HMAC-SHA256 with a random key that is kept in the file and never exported.
        """
        with self._store.guarded():
            (salt,) = self._store.execute("SELECT value FROM meta WHERE key = 'salt'").fetchone()
        return "data:" + hmac.new(bytes.fromhex(salt), text.encode(), "sha256").hexdigest()[:32]

    def close(self) -> None:
        """Close and seal the file; harmless when repeated, and in a forked child, where it is the parent's."""
        self._store.close(seal=True)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise uncopied("ledger", self._store.where)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- writing --------------------------------------------------------------------------------------------------

    def _charge(
        self,
        event: Event,
        count: int,
        least: int,
        run: str,
        step: int,
        note: str,
        scope: Scope,
        records: Records | None,
        budget: Budget | None,
        fits_at: str | None,
        *,
        reserve: bool,
    ) -> tuple[int, int]:
        """Number and count of the new entry, once it is durable."""
        if not isinstance(event, Event) or isinstance(step, bool) or not isinstance(step, int):
            raise ConfigurationError(f"an entry needs an Event and an integer step, got {event!r} and {step!r}.")
        if not all(isinstance(text, str) for text in (run, note)) or not isinstance(budget, Budget | None):
            raise ConfigurationError("run and note must be strings, and budget an sf.Budget or None.")
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_RELEASES:
            raise ConfigurationError(
                f"count must be an integer from 1 to {MOST_RELEASES}, got {count!r}.", found=count, where="count"
            )
        # A round trip repeats the event's own checks (NaN, negative sigma) and proves that it can be read back.
        Event.from_json(event.to_json())
        with self._store.guarded():
            if budget is not None:  # what takes long is computed before others have to wait
                with self._store.transaction("DEFERRED"):
                    self._catch_up()
                if self._chain.head != fits_at:
                    self._allowed(event, count, least, scope, records, budget)
            with self._store.transaction():
                self._catch_up()
                self._refuse_mixed(event)
                if budget is not None and self._chain.head != fits_at:
                    count = self._allowed(event, count, least, scope, records, budget)
                self._store.about_to_change()
                if records is not None and records.digest not in self._spending.sets:
                    self._store.execute("INSERT INTO scopes VALUES (?, ?)", (records.digest, records.encode()))
                    self._written = records
                seq = self._insert(event, count, run, step, note, scope, self._chain.seq + 1 if reserve else None)
        return seq, count

    def _allowed(
        self, event: Event, count: int, least: int, scope: Scope, records: Records | None, budget: Budget
    ) -> int:
        allowed = self._room.allowed(self._spending.candidates(scope, records), event, count, budget)
        if allowed < least:
            raise BudgetExceeded(
                f"{least} more release(s) would exceed epsilon = {budget.epsilon:g} at delta = {budget.delta:g} in "
                f"ledger {self._store.where}; nothing was recorded.",
                found=event,
                where=self._store.where,
                fix="stop here: what was released so far is within the budget.",
            )
        return allowed

    def _insert(
        self, event: Event, count: int, run: str, step: int, note: str, scope: Scope, reservation: int | None
    ) -> int:
        seq, text = self._chain.seq + 1, canonical(event.to_json())
        row = (seq, run, step, scope.group, scope.dataset, scope.records, note, text, count, reservation)
        head = Entry(*row).chained(self._chain.head)
        try:  # what could not be read back must not be committed
            self._chain.checked((*row, head))
        except Broken as error:
            raise LedgerError(f"ledger {self._store.where}: {error}; nothing was recorded.", found=row) from error
        self._store.execute(f"INSERT INTO entries VALUES ({'?, ' * len(row)}?)", (*row, head))
        self._store.execute("UPDATE meta SET value = ? WHERE key = 'head'", (head,))
        return seq

    def _refuse_mixed(self, event: Event) -> None:
        """One ε describes one unit and one kind of neighbour: another would leave the whole ledger without any."""
        units = {unit for unit, _ in self._spending.kinds} - {event.unit}
        kept = {near for _, near in self._spending.kinds if "replace-one" in (near, event.adjacency)}
        held = sorted(units) or sorted(kept - {event.adjacency})
        if held:
            raise LedgerError(
                f"ledger {self._store.where} holds releases that protect one {held[0]}, and this one would protect one "
                f"{event.unit} ({event.adjacency}); nothing was recorded.",
                found=held,
                where=self._store.where,
                fix="use another ledger, and report both guarantees.",
            )

    # -- reading --------------------------------------------------------------------------------------------------

    def _rows(self, after: int) -> list[tuple[Any, ...]]:
        return self._store.execute(
            f"SELECT {COLUMNS}, hash FROM entries WHERE seq > ? ORDER BY seq", (after,)
        ).fetchall()

    def _catch_up(self) -> None:
        """Inside a transaction: read what is new; the end must be what the ledger says it is."""
        if self._torn:  # an interrupt came while entries were counted
            self._chain, self._spending = Chain(), Spending()
        for row in self._rows(self._chain.seq):
            self._torn = True
            entry, event = self._followed(self._chain, row)
            if entry.records is not None and entry.records not in self._spending.sets:
                own = self._written if self._written and self._written.digest == entry.records else None
                self._spending.sets[entry.records] = own or self._numbers(entry.records)
            self._spending.add(entry.scope, event, entry.count)
        self._torn = False
        seq, last = self._store.execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1").fetchone() or (
            0,
            GENESIS,
        )
        if (seq, last) != (self._chain.seq, self._chain.head):
            raise self._store.damaged(
                f"entries up to {self._chain.seq} were here before, and have been rolled back", seq
            )
        (head,) = self._store.execute("SELECT value FROM meta WHERE key = 'head'").fetchone() or (None,)
        if head != last:
            raise self._store.damaged(f"entries after {seq} were removed, or the last one was changed", head)

    def _followed(self, chain: Chain, row: Sequence[Any]) -> tuple[Entry, Event]:
        try:
            return chain.follow(row)
        except Broken as error:
            raise self._store.damaged(str(error), row) from error

    def _numbers(self, digest: str) -> Records:
        """The record numbers with this hash."""
        found = self._store.execute("SELECT records FROM scopes WHERE digest = ?", (digest,)).fetchone()
        try:
            records = Records.decode(found[0] if found else "")
        except (ValueError, TypeError, AttributeError) as error:
            raise self._store.damaged(f"record numbers {digest[:16]}… cannot be read ({error})", digest) from error
        if records.digest != digest:
            raise self._store.damaged(f"record numbers {digest[:16]}… were changed", digest)
        return records

    def _composed(self, counts: dict[Event, int], delta: float) -> Epsilon:
        key = (frozenset(counts.items()), delta)
        found = self._answers.get(key)
        if found is None:
            if len(self._answers) >= MOST_ANSWERS:
                self._answers.clear()
            found = self._answers[key] = compose(counts, delta=delta)
        return found
