"""Launch settings: block sizes, warps and stages, which are data for each GPU architecture.

`launch.json`, or the file that the environment's `KINETIQ_LAUNCH` names in its place, maps operator
→ architecture → key → settings. A GPU takes the first of these that is in the file:

1. what its own architecture says of the key, then of "*",
2. what the older ones of its generation say, the newest first (sm_89 takes sm_86's, and sm_103
   takes sm_100's), each of the key, then of "*",
3. what "default" says of the key, which every GPU can run, then of "*".

Nothing is tuned when an operator is first called: `kinetiq bench tune` writes the entries of the
GPU at hand, to a file of one's own with `--path`.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from kinetiq.errors import InputError

LAUNCH_FILE = Path(__file__).with_name("launch.json")
VARIABLE = "KINETIQ_LAUNCH"  # of the environment: another file in its place
DEFAULT = "default"
_ARCHITECTURE = re.compile(r"default|sm_[0-9]{2,3}|gfx[0-9a-f]+")
_POWER = "a power of two"
_RANGES = {  # of settings that are no powers of two
    "WHOLE": "a number of elements",
    "POSITIONS": "a number of positions",
    "num_stages": "a number above 0",
}
Table = dict[str, dict[str, dict[str, dict[str, int]]]]
_asked: list[str] = []
_choosers: list[Callable[[str, str, dict[str, int]], dict[str, int]]] = []


def settings(operator: str, key: str = "*") -> dict[str, int]:
    """Return block sizes, `num_warps` and `num_stages` of one operator on the present GPU.

    Args:
        operator: name of the operator, or of one of its kernels, as in `launch.json`.
        key: what the settings depend on, such as "d40"; an operator chooses its own words.

    Raises:
        InputError: the file has no entry for this operator, nor a "*" for this key.
    """
    found = dict(_settings(operator, key, architecture()))
    for choose in _choosers:
        found = choose(operator, key, found)
    return found


def architecture() -> str:
    """The architecture to launch on, such as "sm_90"; "default" without a GPU."""
    if _asked:
        return _asked[-1]
    if not _has_gpu():
        return DEFAULT
    return _architecture_of(torch.cuda.current_device())


@contextlib.contextmanager
def pretend(name: str) -> Iterator[None]:
    """Inside, launch settings are those of this architecture, whatever GPU there is."""
    _asked.append(name)
    try:
        yield
    finally:
        _asked.pop()


@contextlib.contextmanager
def choosing(choose: Callable[[str, str, dict[str, int]], dict[str, int]]) -> Iterator[None]:
    """Inside, `choose` sees operator, key and settings of each launch, and returns its settings."""
    _choosers.append(choose)
    try:
        yield
    finally:
        _choosers.pop()


@functools.cache
def _has_gpu() -> bool:  # asked at every launch, and the driver takes its time to answer
    return torch.cuda.is_available()


@functools.cache
def _architecture_of(device: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def launch_file() -> Path:
    """The file that settings are read from: the package's unless the environment names another."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else LAUNCH_FILE


def read_table(path: Path) -> Table:
    """The settings of a launch file.

    Raises:
        InputError: it is not operator → architecture → key → settings, each of them a number
            that the operator knows and can have.
    """
    advice = "write one by `kinetiq bench tune --path FILE`"
    if path != LAUNCH_FILE and path == launch_file():
        advice += f", or unset {VARIABLE}, which names this one"
    try:
        table: Table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: must be a launch file, got: {error}; {advice}") from error
    if not _is_nested(table, 3):
        raise InputError(
            f"{path}: must be a launch file, operator → architecture → key → settings, got "
            f"something else; {advice}"
        )
    if path != LAUNCH_FILE:
        for wrong in _wrong_entries(table, read_table(LAUNCH_FILE)):
            raise InputError(f"{path}: {wrong}; {advice}")
    return table


def _wrong_entries(table: Table, known: Table) -> Iterator[str]:
    """What is wrong with entries, measured by those of the package."""
    for operator, places in table.items():
        if operator not in known:
            yield f"operators must be among {', '.join(known)}, got {operator!r}"
            return
        forms = {frozenset(e) for entries in known[operator].values() for e in entries.values()}
        for place, entries in places.items():
            if not _ARCHITECTURE.fullmatch(place):
                yield f'"{operator}" must be for default, sm_<number> or gfx<name>, got {place!r}'
            for key, entry in entries.items():
                where = f'"{operator}" for "{key}" under "{place}"'
                if frozenset(entry) not in forms:
                    named = " or ".join(sorted(", ".join(sorted(form)) for form in forms))
                    yield f"{where} must have {named}, got {', '.join(sorted(entry))}"
                for name, value in entry.items():
                    if not _fits(name, value):
                        wanted = _RANGES.get(name, _POWER)
                        yield f"{where} must have {wanted} as {name}, got {value}"


def _fits(name: str, value: int) -> bool:
    if name in _RANGES:
        return value >= (1 if name == "num_stages" else 0)
    return value > 0 and not value & (value - 1)


def _is_nested(entries: object, depth: int) -> bool:
    """Whether these are numbers by name, `depth` names deep."""
    if depth < 0:
        return isinstance(entries, int) and not isinstance(entries, bool)
    return isinstance(entries, dict) and all(_is_nested(e, depth - 1) for e in entries.values())


@functools.cache
def _table() -> Table:
    return read_table(launch_file())


def file_entries(operator: str) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    """All that the file says of an operator, by architecture and key."""
    return _table().get(operator, {})


@functools.cache
def _settings(operator: str, key: str, name: str) -> Mapping[str, int]:
    entries = _table().get(operator, {})
    found = find_entry(name, key, entries)
    if found is None:
        raise InputError(
            f'{launch_file()}: must have settings of "{operator}" for "{key}" or "*" under '
            f'"{name}" or "{DEFAULT}", got none; write a whole file by `kinetiq bench tune --path '
            "FILE`"
        )
    place, word = found
    return MappingProxyType(entries[place][word])


def find_entry(
    name: str, key: str, entries: Mapping[str, Mapping[str, object]]
) -> tuple[str, str] | None:
    """The architecture and the key, or "*", whose settings an architecture takes; None for none."""
    for place in (*_generation(name, entries), DEFAULT):
        for word in (key, "*"):
            if word in entries.get(place, {}):
                return place, word
    return None


def _generation(name: str, entries: Iterable[str]) -> list[str]:
    """The architectures of `name`'s generation that are not newer than it, the newest first."""
    if not name.startswith("sm_"):
        return [name]
    number = int(name.removeprefix("sm_"))
    known = [int(entry.removeprefix("sm_")) for entry in entries if entry.startswith("sm_")]
    older = [n for n in known if n <= number and n // 10 == number // 10]
    return [f"sm_{n}" for n in sorted(older, reverse=True)]
