"""Tables drawn from records: for the terminal, for Markdown pages, and for comparing two files.

A page holds blocks between two marks, each alone on its line:

    <!-- figures: query -->
    <!-- /figures -->

The first mark names a bench, and may name some of its figures after it; without names, all are
drawn. What stands between the marks is replaced.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from kinetiq.bench.figures import Figure, Target, format_figure, format_number
from kinetiq.bench.records import Record, newest
from kinetiq.errors import InputError

_OPEN = re.compile(r"<!--\s*figures:\s*(\S+(?:\s+\S+)*?)\s*-->")
_CLOSE = re.compile(r"<!--\s*/figures\s*-->")
_ALMOST = re.compile(r"<!--\s*/?\s*figures\b.*")


@dataclass(frozen=True)
class Comparison:
    """One figure in two records; what a record does not have is None.

    `ratio` is after / before, None where that has no meaning; `low` and `high` bound it by the
    ends of both intervals. `within_noise` says that the two intervals overlap, None where a
    figure has no interval.
    """

    bench: str
    quick: bool
    figure: str
    before: float | None
    after: float | None
    ratio: float | None
    low: float | None
    high: float | None
    within_noise: bool | None


def render_page(text: str, records: Sequence[Record], name: str = "README.md") -> str:
    """`text` with each block of figures drawn from the newest full record of its bench.

    Args:
        text: of the page.
        records: of all benches.
        name: of the page, for errors.

    Raises:
        InputError: a block is not closed or not open, its bench has no full record, or the
            record has no such figure.
    """
    lines: list[str] = []
    opened: tuple[int, str] | None = None  # line number and content of the open block's mark
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{name} line {number}"
        if opening := _OPEN.fullmatch(line.strip()):
            if opened is not None:
                raise InputError(f"{where}: the block of line {opened[0]} must be closed first")
            opened = (number, opening.group(1))
            lines.append(line)
        elif _CLOSE.fullmatch(line.strip()):
            if opened is None:
                raise InputError(f"{where}: a block of figures must be open here, none is")
            lines += [*_draw_block(opened[1].split(), records, f"{name} line {opened[0]}"), line]
            opened = None
        elif _ALMOST.search(line):
            raise InputError(
                f"{where}: a mark must be <!-- figures: BENCH [FIGURE ...] --> or "
                f"<!-- /figures -->, alone on its line, got {line.strip()!r}"
            )
        elif opened is None:
            lines.append(line)
    if opened is not None:
        raise InputError(f"{name} line {opened[0]}: the block of figures must be closed, it is not")
    return "\n".join(lines)


def render_result(record: Record, targets: Mapping[str, Target]) -> str:
    """The table that the terminal shows for one run, with the reason of each missed target."""
    heading = f"{record.bench} (quick)" if record.quick else record.bench
    rows = [("figure", "value", "target", "")]
    for name in record.figures:
        mark = "" if name not in record.targets else "missed" if name in record.missed else "kept"
        rows.append((name, format_figure(record.figure(name)), _target_text(record, name), mark))
    lines = [heading, *align(rows)]
    lines += [
        f"missed {name}: must be {_target_text(record, name)}, "
        f"got {_apart(record, name)}. {targets[name].why}"
        for name in record.missed
    ]
    return "\n".join([*lines, f"measured in {format_number(record.seconds)} s"])


def compare(before: Sequence[Record], after: Sequence[Record]) -> list[Comparison]:
    """The newest records of each bench on both sides, figure by figure.

    Quick runs are compared with quick runs, full ones with full ones.

    Raises:
        InputError: no bench is on both sides.
    """
    keys = list(dict.fromkeys((record.bench, record.quick) for record in before))
    comparisons = []
    for bench, quick in keys:
        first, second = (newest(side, bench, quick=quick) for side in (before, after))
        if first is not None and second is not None:
            names = dict.fromkeys([*first.figures, *second.figures])
            comparisons += [_compare_figure(first, second, name) for name in names]
    if not comparisons:
        raise InputError(
            "compare: both files must hold a record of the same bench, both quick or both full; "
            f"got {_benches(before)} and {_benches(after)}"
        )
    return comparisons


def render_comparison(comparisons: Sequence[Comparison]) -> str:
    """The table of `compare` in words."""
    rows = [("bench", "figure", "before", "after", "after / before", "")]
    for item in comparisons:
        ratio = (
            "-" if item.ratio is None else format_figure(Figure(item.ratio, item.low, item.high))
        )
        rows.append(
            (
                f"{item.bench} (quick)" if item.quick else item.bench,
                item.figure,
                "-" if item.before is None else format_number(item.before),
                "-" if item.after is None else format_number(item.after),
                ratio,
                "within noise" if item.within_noise else "",
            )
        )
    return "\n".join(align(rows))


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose columns stand below each other, two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _draw_block(names: Sequence[str], records: Sequence[Record], where: str) -> list[str]:
    bench, *figures = names
    record = newest(records, bench, quick=False)
    if record is None:
        raise InputError(
            f'{where}: bench "{bench}" must have a record of a full run, got none; '
            f"run `kinetiq bench {bench}`"
        )
    for name in figures:
        if name not in record.figures:
            known = ", ".join(record.figures)
            raise InputError(f'{where}: a figure must be one of {known}, got "{name}"')
    lines = ["", "| figure | value | target | command |", "| --- | --- | --- | --- |"]
    for name in figures or record.figures:
        target = _target_text(record, name) + (" (missed)" if name in record.missed else "")
        value = format_figure(record.figure(name))
        lines.append(f"| `{name}` | {value} | {target or '-'} | `{record.command}` |")
    return [*lines, "", _footnote(record), ""]


def _footnote(record: Record) -> str:
    environment = record.environment
    commit = environment["commit"]
    at = "no commit" if commit is None else f"commit {commit[:10]}"
    if environment["dirty"]:
        at += " with local changes"
    machine = environment["machine"]
    parts = [machine.get("cpu")]
    if machine.get("cores"):
        parts.append(f"{machine['cores']} cores")
    if machine.get("ram"):
        parts.append(f"{format_number(machine['ram'] / 2**30)} GiB")
    parts.append(machine.get("gpu"))
    parts += [f"{name} {environment['versions'].get(name)}" for name in ("python", "torch")]
    day = datetime.fromisoformat(record.date).date().isoformat()
    return f"Measured at {at} on {day}: {', '.join(part for part in parts if part)}."


def _target_text(record: Record, name: str) -> str:
    words = {"at_least": "at least", "at_most": "at most"}
    return "".join(
        f"{words[kind]} {bound:g}" for kind, bound in record.targets.get(name, {}).items()
    )


def _apart(record: Record, name: str) -> str:
    """The value in as many digits as tell it from its bound, since 0.9499 is not 0.95."""
    (bound,) = record.targets[name].values()
    value = record.figures[name]
    short = format_number(value)
    return short if float(short.replace(",", "")) != bound else repr(value)


def _compare_figure(first: Record, second: Record, name: str) -> Comparison:
    before = first.figure(name) if name in first.figures else None
    after = second.figure(name) if name in second.figures else None
    ratio = low = high = noise = None
    if before is not None and after is not None:
        if before.value > 0 and after.value >= 0:
            ratio = after.value / before.value
        low, high = _ratio_bounds(before, after) if ratio is not None else (None, None)
        noise = _overlap(before, after)
    return Comparison(
        first.bench,
        first.quick,
        name,
        None if before is None else before.value,
        None if after is None else after.value,
        ratio,
        low,
        high,
        noise,
    )


def _ratio_bounds(before: Figure, after: Figure) -> tuple[float | None, float | None]:
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return None, None
    if before.low <= 0 or after.low < 0:
        return None, None
    return after.low / before.high, after.high / before.low


def _overlap(before: Figure, after: Figure) -> bool | None:
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return None
    return before.low <= after.high and after.low <= before.high


def _benches(records: Sequence[Record]) -> str:
    names = dict.fromkeys(f"{r.bench} (quick)" if r.quick else r.bench for r in records)
    return ", ".join(names) or "no record"
