"""Records of a bench that is run in parts: each part's own, and all of them joined.

A part run with `--out DIR` leaves its record as `DIR/<bench>.<part>.jsonl`. Records of one commit,
one GPU, one driver and the same versions are joined to one, which has the figures of all parts;
of two records with the same figure the newer one has it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from kinetiq.bench.records import Record, read_records
from kinetiq.errors import InputError, OutputError, WorkError
from kinetiq.files import write_text

Say = Callable[[str], object]


def measure_parts(
    bench: str,
    parts: Sequence[str],
    measure: Callable[[str], Record],
    out: Path | None,
    say: Say,
) -> Record:
    """Measure parts one after the other and join their records with those that lie in `out`.

    A part that could not be measured is said, and the next one goes on. So is a record in `out`
    that was made otherwise, and is left out.

    Args:
        bench: name of the bench.
        parts: which ones.
        measure: measures one.
        out: where records of parts are kept, or None.
        say: tells what went wrong.

    Raises:
        WorkError: none could be measured.
        OutputError: the folder cannot be made.
    """
    if out is not None:
        make_folder(out)  # before minutes are spent on what would be lost
    records: dict[str, Record] = {}
    broken: list[str] = []
    for part in parts:
        try:
            records[part] = measure(part)
        except WorkError as error:
            if len(parts) == 1:
                raise
            broken.append(part)
            say(str(error))
            continue
        if out is not None:
            path = part_file(out, bench, part)
            write_text(path, records[part].line + "\n", f"bench {bench}")
    if not records:
        raise WorkError(
            f"bench {bench}: at least one part must be measured, none could be: {', '.join(broken)}"
        )
    newest = list(records.values())[-1]
    joined: list[Record] = []
    for part, record in ({} if out is None else read_parts(out, bench)).items():
        if part in records:
            continue
        if differences(record, newest):
            say(f"{part} in {out} is left out: {_said(record, newest)}")
        else:
            joined.append(record)
    return join([*joined, *records.values()])


def merge_folders(bench: str, folders: Sequence[Path]) -> Record:
    """The newest record of each part in some folders, joined; nothing is measured.

    Raises:
        InputError: there is none, one cannot be read, or they were made differently.
    """
    newest: dict[str, Record] = {}
    for folder in folders:
        for part, record in read_parts(folder, bench).items():
            if part not in newest or _date(record) >= _date(newest[part]):
                newest[part] = record
    if not newest:
        names = ", ".join(map(str, folders))
        raise InputError(
            f"{names}: must hold records of parts, {bench}.<part>.jsonl, got none; run "
            f"`kinetiq bench {bench} --part NAME --out DIR`"
        )
    return join(list(newest.values()))


def join(records: Sequence[Record]) -> Record:
    """One record with the figures of all.

    Raises:
        InputError: they were made at different commits, on different machines or otherwise.
    """
    ordered = sorted(records, key=_date)
    first = ordered[0]
    for record in ordered[1:]:
        if differences(record, first):
            raise InputError(
                f"bench {first.bench}: records must be made alike to be joined, "
                f"{_said(record, first)}"
            )
    if len(ordered) == 1:
        return first
    figures: dict[str, float] = {}
    targets: dict[str, dict[str, float]] = {}
    intervals: dict[str, list[float | int | None]] = {}
    units: dict[str, str] = {}
    missed: dict[str, bool] = {}
    for record in ordered:
        for name in record.figures:  # what an older record says of it goes with its value
            for known in (intervals, targets, units):
                known.pop(name, None)
            missed[name] = name in record.missed
        figures |= record.figures
        targets |= record.targets
        intervals |= record.intervals
        units |= record.units
    return replace(
        first,
        figures=figures,
        targets=targets,
        missed=[name for name in figures if missed[name]],
        intervals=intervals,
        units=units,
        seconds=round(sum(record.seconds for record in ordered), 3),
        command=" && ".join(dict.fromkeys(record.command for record in ordered)),
    )


def differences(first: Record, second: Record) -> dict[str, tuple[Any, Any]]:
    """What keeps two records from being joined, with both values."""
    one, other = _made(first), _made(second)
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


def read_parts(folder: Path, bench: str) -> dict[str, Record]:
    """The newest record of each part in a folder."""
    found = {}
    for path in sorted(folder.glob(part_file(Path(), bench, "*").name)):
        part = path.name.removeprefix(f"{bench}.").removesuffix(".jsonl")
        records = read_records(path)
        if records:
            found[part] = records[-1]
    return found


def make_folder(folder: Path) -> None:
    """Make a folder that may be there already.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: must be a folder, got: {error}") from error


def part_file(folder: Path, bench: str, part: str) -> Path:
    """Where the record of a part lies."""
    return folder / f"{bench}.{part}.jsonl"


def _date(record: Record) -> datetime:
    return datetime.fromisoformat(record.date)


def _made(record: Record) -> dict[str, Any]:
    environment = record.environment
    return {
        "bench": record.bench,
        "quick": record.quick,
        "commit": environment["commit"],
        "dirty": environment["dirty"],
        "device": environment.get("device"),
        "GPU": environment["machine"].get("gpu"),
        "driver": _branch(environment["machine"].get("driver")),
        "versions": environment["versions"],
    }


def _branch(driver: str | None) -> str | None:
    """The branch and the release of a driver; machines of one kind differ in what follows."""
    return None if driver is None else ".".join(driver.split(".")[:2])


def _said(record: Record, wanted: Record) -> str:
    return "; ".join(
        f"{name} must be {want}, got {got}"
        for name, (got, want) in differences(record, wanted).items()
    )
