"""Launch settings: block sizes, warps and stages, which are data for each GPU architecture.

`launch.json` maps operator → architecture → key → settings. The entries of an architecture that
is not in the file are those of the nearest older one of its generation (sm_87 takes sm_86), else
"default"; a key that is not there takes "*". Nothing is tuned when an operator is first called.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from kinetiq.errors import WorkError

LAUNCH_FILE = Path(__file__).with_name("launch.json")
DEFAULT = "default"
_asked: list[str] = []


def settings(operator: str, key: str = "*") -> dict[str, int]:
    """Return block sizes, `num_warps` and `num_stages` of one operator on the present GPU.

    Args:
        operator: name of the operator, or of one of its kernels, as in `launch.json`.
        key: what the settings depend on, such as "d40"; an operator chooses its own words.

    Raises:
        WorkError: the file has no entry for this operator, nor a "*" for this key.
    """
    return dict(_settings(operator, key, architecture()))


def architecture() -> str:
    """The architecture to launch on, such as "sm_90"; "default" without a GPU."""
    if _asked:
        return _asked[-1]
    if not torch.cuda.is_available():
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


@functools.cache
def _architecture_of(device: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    table: dict[str, dict[str, dict[str, dict[str, int]]]] = json.loads(
        LAUNCH_FILE.read_text(encoding="utf-8")
    )
    return table


@functools.cache
def _settings(operator: str, key: str, name: str) -> Mapping[str, int]:
    entries = _table().get(operator, {})
    for place in (_nearest(name, entries), DEFAULT):
        for word in (key, "*"):
            if word in entries.get(place, {}):
                return MappingProxyType(entries[place][word])
    raise WorkError(
        f'{LAUNCH_FILE.name}: must have settings of "{operator}" for "{key}" or "*" under '
        f'"{name}" or "{DEFAULT}", got none'
    )


def _nearest(name: str, entries: Mapping[str, object]) -> str:
    """The newest architecture of the same generation that is not newer than `name`."""
    if name in entries or not name.startswith("sm_"):
        return name
    number = int(name.removeprefix("sm_"))
    known = [int(entry.removeprefix("sm_")) for entry in entries if entry.startswith("sm_")]
    older = [n for n in known if n <= number and n // 10 == number // 10]
    return f"sm_{max(older)}" if older else DEFAULT
