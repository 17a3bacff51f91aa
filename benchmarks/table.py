"""Results as Markdown."""

from typing import Any


def _cell(entry: dict[str, Any] | None, base: dict[str, Any]) -> str:
    if entry is None:
        return "–"
    spread = f" [{_number(entry['low'])}, {_number(entry['high'])}]" if entry is not base else ""
    memory = "" if entry.get("peak_mib") is None else f" ({entry['peak_mib']:.0f})"
    return (
        f"{_number(entry['ratio'])}×{spread}{memory}"
        if entry is not base
        else f"{entry['seconds'] * 1e3:.0f} ms{memory}"
    )


def _number(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:.0f}"


def one(work: dict[str, Any]) -> str:
    """A workload as plain lines."""
    base = work["engines"]["non-private"]
    lines = [f"{work['title']} ({work['parameters']:,} trained parameters)"]
    lines += [f"  {name:18} {_cell(entry, base)}" for name, entry in work["engines"].items()]
    lines += [f"  {name:18} – {error}" for name, error in work["errors"].items()]
    lines += [f"  noise, {name:11} {_cell(entry, base)}" for name, entry in work["noise"].items()]
    return "\n".join(lines)


def whole(result: dict[str, Any]) -> str:
    """Everything as one table."""
    works = list(result["workloads"].values())
    names = list(dict.fromkeys(n for w in works for n in [*w["engines"], *w["errors"]]))
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines = [
        f"{result['date']}; {result['machine']}; {versions}; {result['rounds']} rounds, {result['clock']} time.",
        "",
        "Time of one step as a ratio to the non-private step, median [quartiles] of the rounds; in brackets the step's "
        "peak memory above resting, MiB. Clipping without noise; noise on its own below. – cannot run.",
        "",
        "| workload | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for w in works:
        base = w["engines"]["non-private"]
        lines.append(f"| {w['title']} | " + " | ".join(_cell(w["engines"].get(n), base) for n in names) + " |")
    lines += ["", "| noise over all parameters | torch.randn | secure |", "|---|---|---|"]
    for w in works:
        base = w["engines"]["non-private"]
        cells = (_cell(w["noise"].get(n), base) for n in ("torch.randn", "secure"))
        lines.append(f"| {w['title']} | " + " | ".join(cells) + " |")
    failed = [(w["title"], n, e) for w in works for n, e in w["errors"].items()]
    if failed:
        lines += ["", "Cannot run:", ""]
        lines += [f"- {n} on {title}: {e}" for title, n, e in failed]
    return "\n".join(lines) + "\n"
