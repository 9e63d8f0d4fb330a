"""Which operators run our kernels in an engine of full TensorRT, and by which PTX, by record.

TensorRT has fused attention of its own, which it makes of a node's function body. Whether our
kernel is faster depends on the GPU, so it is data: `plugin_choice.json` maps target → what was
fastest there and the seconds of all that was tried. `kinetiq export tune` measures it, on the GPU.
The environment's `KINETIQ_PLUGINS` names another file in its place.

A target without a record gets our kernels for all operators that can be one kernel, by its first
route: they are what an engine of full TensorRT is built for, and nothing is known against them.
"""

import functools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kinetiq.errors import InputError, RequestError, ShapeError, WorkError
from kinetiq.export.plugin_layers import KINDS
from kinetiq.files import write_text

CHOICE_FILE = Path(__file__).with_name("plugin_choice.json")
VARIABLE = "KINETIQ_PLUGINS"  # of the environment: another file in its place
OPERATORS = tuple(dict.fromkeys(kind.operator for kind in KINDS.values()))
_WORTH = 0.98  # of the time without our kernels; less of a gain is noise


@dataclass(frozen=True)
class PluginChoice:
    """What an engine runs by our kernels.

    Args:
        operators: of `OPERATORS`; the nodes of the others run their function bodies.
        route: name of the PTX's route, of `plugin_ptx.ROUTES`; None: the target's first.
    """

    operators: tuple[str, ...]
    route: str | None = None

    @property
    def name(self) -> str:
        """Such as "query_attention+motion_feature by sm_80", or "functions"."""
        return f"{'+'.join(self.operators)} by {self.route}" if self.operators else "functions"


@dataclass(frozen=True)
class PluginRecord:
    """What was measured on one kind of GPU.

    Args:
        choice: what was fastest, by 2 % at the least where it has plugins.
        seconds: of one prediction, by the name of each choice that could be built.
        refused: why others could not, by name.
        measured: on what: GPU, versions, network, sizes.
    """

    choice: PluginChoice
    seconds: Mapping[str, float]
    refused: Mapping[str, str]
    measured: Mapping[str, str]


Table = Mapping[str, PluginRecord]
FUNCTIONS = PluginChoice(())


def choose_by_record(target: str, table: Table | None = None) -> PluginChoice:
    """What an engine for a target runs by our kernels, where nobody says.

    Args:
        target: such as "sm_90".
        table: the records; None: those of `choice_file`.

    Raises:
        InputError: the file that the environment names cannot be used.
    """
    found = (_kept_table(choice_file()) if table is None else table).get(target)
    return PluginChoice(OPERATORS) if found is None else found.choice


def choice_file() -> Path:
    """The file that records are read from: the package's unless the environment names another."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else CHOICE_FILE


def check_operators(asked: Collection[str]) -> tuple[str, ...]:
    """The operators in the order of `OPERATORS`.

    Raises:
        RequestError: one is not known.
    """
    unknown = sorted(set(asked) - set(OPERATORS))
    if isinstance(asked, str) or unknown:
        raise RequestError(
            f"export: plugins must be among {', '.join(OPERATORS)}, "
            f"got {asked if isinstance(asked, str) else ', '.join(unknown)}"
        )
    return tuple(operator for operator in OPERATORS if operator in asked)


def measure_choices(
    operators: Sequence[str],
    routes: Sequence[str],
    seconds_of: Callable[[PluginChoice], float],
    measured: Mapping[str, str],
) -> PluginRecord:
    """Try each operator alone by each route, then those that won together by their route.

    Args:
        operators: to try; those that can be plugins.
        routes: of the target.
        seconds_of: builds an engine and times it.
        measured: on what.

    Raises:
        WorkError: an engine without our kernels cannot be built, with which all are compared.
    """
    seconds, refused = {FUNCTIONS: seconds_of(FUNCTIONS)}, {}

    def measure(choice: PluginChoice) -> None:
        try:
            seconds[choice] = seconds_of(choice)
        except (RequestError, ShapeError, WorkError, torch.OutOfMemoryError) as error:
            refused[choice.name] = str(error)

    worth = _WORTH * seconds[FUNCTIONS]
    for route in routes:
        for operator in operators:
            measure(PluginChoice((operator,), route))
        alone = [PluginChoice((operator,), route) for operator in operators]
        won = [choice.operators[0] for choice in alone if seconds.get(choice, worth) < worth]
        if len(won) > 1:
            measure(PluginChoice(tuple(won), route))
    best = min(seconds, key=seconds.__getitem__)
    return PluginRecord(
        choice=best if seconds[best] < worth else FUNCTIONS,
        seconds={choice.name: time for choice, time in seconds.items()},
        refused=refused,
        measured=measured,
    )


def read_table(path: Path) -> Table:
    """The records of a file.

    Raises:
        InputError: it cannot be read, or is not a file of such records.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return {target: _parse(entry) for target, entry in said.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: must be a file of plugin choices, as `kinetiq export tune --path` writes, "
            f"got: {error!r}"
        ) from error


def write_record(path: Path, target: str, record: PluginRecord) -> None:
    """Put the record of a target into a file, in the place of what it says of it.

    Raises:
        InputError: the file is there and is not a file of such records.
        OutputError: it cannot be written.
    """
    table = dict(read_table(path if path.exists() else CHOICE_FILE)) | {target: record}
    said = {name: asdict(entry) for name, entry in sorted(table.items())}
    write_text(path, json.dumps(said, indent=2) + "\n", "export tune")


@functools.cache
def _kept_table(path: Path) -> Table:
    return read_table(path)


def _parse(entry: Mapping[str, Mapping[str, object]]) -> PluginRecord:
    operators, route = entry["choice"]["operators"], entry["choice"]["route"]
    if not isinstance(operators, list) or not isinstance(route, str | None):
        raise TypeError(f"operators must be a list and route a name, got {operators}, {route}")
    return PluginRecord(
        choice=PluginChoice(check_operators(operators), route),
        seconds={name: float(str(time)) for name, time in entry["seconds"].items()},
        refused={name: str(why) for name, why in entry["refused"].items()},
        measured={name: str(word) for name, word in entry["measured"].items()},
    )
