"""Records: one JSON line a run, appended and never edited."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kinetiq.bench.figures import Figure
from kinetiq.errors import InputError, OutputError

_TYPES: dict[str, type | tuple[type, ...]] = {
    "bench": str,
    "figures": dict,
    "targets": dict,
    "missed": list,
    "environment": dict,
    "intervals": dict,
    "quick": bool,
    "seconds": (int, float),
    "command": str,
    "date": str,
    "units": dict,
}


@dataclass(frozen=True)
class Record:
    """What one run of a bench measured, and where.

    Args:
        bench: name of the bench.
        figures: name → value.
        targets: name → {"at_least" or "at_most": bound}, for the figures that have one.
        missed: names of the figures that miss their target.
        environment: see `kinetiq.bench.environment.describe_environment`.
        intervals: name → [low, high, n], for the figures that carry any; None where not known.
        quick: whether this was a small sample.
        seconds: wall-clock time of the run.
        command: what makes these figures again.
        date: when the run began, UTC, ISO 8601.
        units: name → unit, for the figures that have one.
    """

    bench: str
    figures: dict[str, float]
    targets: dict[str, dict[str, float]]
    missed: list[str]
    environment: dict[str, Any]
    intervals: dict[str, list[float | int | None]]
    quick: bool
    seconds: float
    command: str
    date: str
    units: dict[str, str]

    @property
    def result(self) -> dict[str, Any]:
        """The object that `kinetiq bench NAME --json` prints."""
        entries = asdict(self)
        del entries["units"]
        return entries

    @property
    def line(self) -> str:
        """The line of a results file, without its newline."""
        return json.dumps(asdict(self), allow_nan=False, ensure_ascii=False)

    def figure(self, name: str) -> Figure:
        """One figure of this record with all that is known of it."""
        low, high, n = self.intervals.get(name, [None, None, None])
        count = None if n is None else int(n)
        return Figure(self.figures[name], low, high, count, self.units.get(name, ""))


def append_record(record: Record, folder: Path) -> Path:
    """Append `record` to `<bench>.jsonl` in `folder`, which is made if needed; its path.

    The line goes out in one write to a file opened for appending, so that runs side by side
    never mix their lines, and a run that was killed costs at most its own line.

    Raises:
        OutputError: the folder or the file cannot be written.
    """
    path = folder / f"{record.bench}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            line = _separator(path) + record.line.encode() + b"\n"
            written = file.write(line)
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{path}: must be writable, got: {error}") from error
    if written != len(line):
        raise OutputError(
            f"{path}: must take a line of {len(line)} bytes, took {written}; is the disk full?"
        )
    return path


def read_records(path: Path) -> list[Record]:
    """All records of one results file, in the order of its lines.

    Raises:
        InputError: the file cannot be read, or a line is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: must be a file of records, got: {error}") from error
    return [
        _parse(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def read_folder(folder: Path) -> list[Record]:
    """All records of the results files in `folder`.

    Raises:
        InputError: the folder is not there, or a file in it is not one of records.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: must be a folder of results files, got none")
    return [record for path in sorted(folder.glob("*.jsonl")) for record in read_records(path)]


def newest(records: Sequence[Record], bench: str, *, quick: bool) -> Record | None:
    """The latest record of `bench` that is, or is not, of a quick run; None without one."""
    fitting = [record for record in records if record.bench == bench and record.quick == quick]
    # Reversed, so that of two runs within one second the line further down is the newer.
    return max(reversed(fitting), key=lambda r: datetime.fromisoformat(r.date), default=None)


def _separator(path: Path) -> bytes:
    """What must stand before a new line: a newline where a killed run left half a line."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read(1) == b"\n" else b"\n"


def _parse(line: str, where: str) -> Record:
    try:
        entries = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"{where}: must be one JSON object, got: {error}; delete the line if a run was killed"
        ) from error
    if not isinstance(entries, dict) or set(entries) != set(_TYPES):
        got = sorted(entries) if isinstance(entries, dict) else type(entries).__name__
        raise InputError(f"{where}: must have the keys {sorted(_TYPES)}, got {got}")
    for key, kind in _TYPES.items():
        if not isinstance(entries[key], kind):
            raise InputError(
                f"{where}: {key} must be {_kind_name(kind)}, got {type(entries[key]).__name__}"
            )
    _check_figures(entries, where)
    _check_environment(entries["environment"], where)
    _check_date(entries["date"], where)
    return Record(**entries)


def _check_figures(entries: dict[str, Any], where: str) -> None:
    for name, value in entries["figures"].items():
        if not _is_number(value):
            raise InputError(f'{where}: figure "{name}" must be a finite number, got {value!r}')
    for name, target in entries["targets"].items():
        kinds = list(target) if isinstance(target, dict) else []
        if kinds not in (["at_least"], ["at_most"]) or not _is_number(target[kinds[0]]):
            raise InputError(
                f'{where}: target "{name}" must be at_least or at_most a number, got {target!r}'
            )
    for name, interval in entries["intervals"].items():
        fits = isinstance(interval, list) and len(interval) == 3
        if not fits or not all(number is None or _is_number(number) for number in interval):
            raise InputError(f'{where}: interval "{name}" must be [low, high, n], got {interval!r}')


def _check_environment(environment: dict[str, Any], where: str) -> None:
    for key in ("commit", "dirty", "machine", "versions"):
        if key not in environment:
            raise InputError(f"{where}: environment must have {key}, got {sorted(environment)}")
    for key in ("machine", "versions"):
        if not isinstance(environment[key], dict):
            raise InputError(f"{where}: {key} must be an object, got {environment[key]!r}")


def _check_date(date: str, where: str) -> None:
    try:
        aware = datetime.fromisoformat(date).tzinfo is not None
    except ValueError:
        aware = False
    if not aware:
        raise InputError(f'{where}: date must be ISO 8601 with its offset from UTC, got "{date}"')


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _kind_name(kind: type | tuple[type, ...]) -> str:
    return kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
