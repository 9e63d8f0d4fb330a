"""Figures and their targets.

A figure is one measured number with a stable dotted name, such as "query.motion_fidelity". A
target is the bound that it should keep, with the sentence that says why.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kinetiq.errors import InputError, NonFiniteError

TARGETS_FILE = Path(__file__).with_name("targets.json")
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+")
_KINDS: tuple[Literal["at_least", "at_most"], ...] = ("at_least", "at_most")


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Args:
        value: the number itself.
        low: lower end of its 95 % interval; given with `high` or not at all.
        high: upper end of its 95 % interval.
        n: how many independent samples it rests on.
        unit: what it is counted in, as it is printed; empty for a pure number.

    Raises:
        NonFiniteError: a number is NaN or infinite.
        InputError: the interval or `n` has no meaning.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        for field in ("value", "low", "high"):
            number = getattr(self, field)
            if number is None and field != "value":
                continue
            object.__setattr__(self, field, float(number))  # NumPy's float32 cannot become JSON
            if not math.isfinite(number):
                raise NonFiniteError(f"figure: {field} must be finite, got {number}")
        if (self.low is None) != (self.high is None):
            raise InputError(
                f"figure: low and high must be given together, got {self.low} and {self.high}"
            )
        if self.low is not None and self.high is not None and self.low > self.high:
            raise InputError(f"figure: low must be at most high, got {self.low} and {self.high}")
        if self.n is not None and self.n < 1:
            raise InputError(f"figure: n must be at least 1, got {self.n}")


@dataclass(frozen=True)
class Target:
    """The bound that a figure should keep; a figure that equals it keeps it."""

    kind: Literal["at_least", "at_most"]
    bound: float
    why: str

    def is_missed_by(self, value: float) -> bool:
        """Whether `value` lies on the wrong side of the bound."""
        return value < self.bound if self.kind == "at_least" else value > self.bound


def check_name(name: str, where: str) -> None:
    """Raise InputError unless `name` is a figure's name: lower-case words joined by dots."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{where}: a figure's name must be lower-case words joined by dots, "
            f'such as "query.motion_fidelity", got "{name}"'
        )


def missed_targets(figures: Mapping[str, float], targets: Mapping[str, Target]) -> list[str]:
    """Names of the figures that miss their target, in the order of `figures`."""
    return [
        name
        for name, value in figures.items()
        if name in targets and targets[name].is_missed_by(value)
    ]


def load_targets(path: Path = TARGETS_FILE) -> dict[str, Target]:
    """Read a file of targets: name → {"at_least" or "at_most": number, "why": sentence}.

    Raises:
        InputError: the file cannot be read, or says anything else than that.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: must be a JSON file of targets, got: {error}") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path}: must hold one JSON object, got {type(entries).__name__}")
    return {name: _parse_target(entry, name, path) for name, entry in entries.items()}


def format_number(value: float) -> str:
    """Three significant digits, as a person would write them: 0.0123, 1.5, 12,300."""
    rounded = float(f"{value:.3g}")
    if 1e3 <= abs(rounded) < 1e9:
        return f"{rounded:,.0f}"
    return f"{rounded:.3g}"


def format_figure(figure: Figure) -> str:
    """The value with its unit, interval and n, such as "2.1 s (1.9 to 2.3, n = 20)"."""
    text = format_number(figure.value)
    if figure.unit:
        text += f" {figure.unit}"
    notes = []
    if figure.low is not None and figure.high is not None:
        notes.append(f"{format_number(figure.low)} to {format_number(figure.high)}")
    if figure.n is not None:
        notes.append(f"n = {figure.n}")
    return f"{text} ({', '.join(notes)})" if notes else text


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Without this, JSON keeps the last of two equal keys, and the first target is lost unseen.
    entries: dict[str, object] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f'"{name}" is given twice')
        entries[name] = value
    return entries


def _parse_target(entry: object, name: str, path: Path) -> Target:
    check_name(name, str(path))
    where = f'{path}: target "{name}"'
    if not isinstance(entry, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(entry).__name__}")
    unknown = [key for key in entry if key not in (*_KINDS, "why")]
    if unknown:
        raise InputError(f"{where}: keys must be at_least or at_most, and why; got {unknown}")
    kinds = [kind for kind in _KINDS if kind in entry]
    if len(kinds) != 1:
        raise InputError(f"{where}: must have one of at_least and at_most, got {kinds}")
    bound, why = entry[kinds[0]], entry.get("why")
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound):
        raise InputError(f"{where}: {kinds[0]} must be a finite number, got {bound!r}")
    if not isinstance(why, str) or not why.strip():
        raise InputError(f"{where}: why must be a sentence, got {why!r}")
    return Target(kinds[0], float(bound), why)
