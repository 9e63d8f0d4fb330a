"""What a bench is, which there are, and how one is run.

A bench is a module of this package that exposes `BENCH`. It is named in `BENCHES`, and imported
only when it is run or listed:

    def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
        prompts = ...
        for prompt in progress.track(prompts, "query"):
            ...
        return {"query.motion_fidelity": Figure(0.87, 0.84, 0.9, n=64)}

    BENCH = Bench("query", "motion and identity under query injection", measure)
"""

import contextlib
import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import click
import torch

from kinetiq.bench.environment import describe_environment
from kinetiq.bench.figures import Figure, Target, check_name, missed_targets
from kinetiq.bench.records import Record
from kinetiq.checkpoint import resolve_device
from kinetiq.errors import MissingDependencyError, NonFiniteError, RequestError, WorkError

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class BenchOptions:
    """What a bench is asked for.

    Args:
        quick: measure a small sample, in under a minute.
        seed: where the bench's random choices start; same seed, same choices.
        device: "cpu", "cuda" or "cuda:N".
        out: folder for clips and plots that a bench makes on the way; None keeps none.
        part: one of the bench's parts; None: all of it.
        seconds: that a part may take; None: what the bench allows.
        keep: told of the figures found so far by a bench that may be cut off.
    """

    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    out: Path | None = None
    part: str | None = None
    seconds: float | None = None
    keep: Callable[[Mapping[str, Figure]], None] = lambda _: None


@dataclass(frozen=True)
class Progress:
    """Shows how far a bench is, on standard error, when it is `visible`."""

    visible: bool = False

    def track(
        self, items: Iterable[_Item], label: str, total: int | None = None
    ) -> Iterator[_Item]:
        """The items, with a bar behind them; `total` is for items that have no length."""
        with click.progressbar(
            items, length=total, label=label, file=sys.stderr, hidden=not self.visible
        ) as bar:
            yield from bar


@dataclass(frozen=True)
class Bench:
    """One bench.

    Args:
        name: what the command line calls it.
        summary: one line for lists.
        run: measures; figures by their dotted names.
        needs: what the machine must have: "gpu", or packages by the name they are imported by.
        parts: names of the parts that can be run for themselves; none if it is one whole.
    """

    name: str
    summary: str
    run: Callable[[BenchOptions, Progress], Mapping[str, float | Figure]]
    needs: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Registry:
    """Benches by name, each in a module that is imported when it is asked for."""

    modules: Mapping[str, str]

    def load(self, name: str) -> Bench:
        """Import the module of one bench.

        Raises:
            RequestError: there is no bench of this name.
            WorkError: its module cannot be imported, or does not expose it.
        """
        if name not in self.modules:
            raise RequestError(f'bench: must be one of {", ".join(self.modules)}, got "{name}"')
        module = self.modules[name]
        try:
            bench = getattr(importlib.import_module(module), "BENCH", None)
        except ImportError as error:
            raise WorkError(f"bench {name}: {module} must be importable, got: {error}") from error
        if not isinstance(bench, Bench) or bench.name != name:
            raise WorkError(f'bench {name}: {module} must expose BENCH with name="{name}"')
        return bench


BENCHES = Registry(
    {
        "sprites": "kinetiq.bench.sprites",
        "query": "kinetiq.bench.query",
        "query_cost": "kinetiq.bench.query_cost",
        "probe": "kinetiq.bench.probe",
        "embedding": "kinetiq.bench.embedding",
        "lora": "kinetiq.bench.lora",
        "training_cost": "kinetiq.bench.training_cost",
        "mixed_motion": "kinetiq.bench.mixed_motion",
        "moft": "kinetiq.bench.moft",
        "moft_cost": "kinetiq.bench.moft_cost",
        "moft_taps": "kinetiq.bench.moft_taps",
        "shots": "kinetiq.bench.shots",
        "kernels": "kinetiq.bench.kernels",
        "compile": "kinetiq.bench.compile",
        "export": "kinetiq.bench.export",
        "gpu": "kinetiq.bench.gpu",
    }
)


def choose_device(asked: str | None) -> str:
    """The device to measure on: what was asked for, else a GPU where there is one.

    Raises:
        RequestError: `asked` is neither a CPU nor a CUDA device.
        MissingDependencyError: that GPU is not there.
    """
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(resolve_device(asked))


def unmet_needs(bench: Bench, device: str) -> list[str]:
    """What `bench` needs and does not get, in words."""
    unmet = []
    for need in bench.needs:
        if need == "gpu":
            if not device.startswith("cuda"):
                unmet.append(f"an NVIDIA GPU (the device is {device})")
        elif importlib.util.find_spec(need) is None:
            unmet.append(f"the package {need}")
    return unmet


def run_bench(
    bench: Bench,
    options: BenchOptions,
    *,
    targets: Mapping[str, Target],
    command: str,
    progress: Progress,
    keep: Callable[[Record], None] | None = None,
) -> Record:
    """Measure, and judge the figures by `targets`; a missed target is no error.

    What the bench prints goes to standard error, since standard output belongs to the result.
    `keep` is given a record of what was found so far as often as the bench says it.

    Raises:
        MissingDependencyError: the machine lacks what the bench needs.
        WorkError: the bench did not finish, or what it returned is not figures.
    """
    unmet = unmet_needs(bench, options.device)
    if unmet:
        raise MissingDependencyError(f"bench {bench.name}: needs {' and '.join(unmet)}")
    began, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    environment = describe_environment(options.device)

    def record(measured: Mapping[str, float | Figure]) -> Record:
        figures = _check_figures(measured, f"bench {bench.name}")
        values = {name: figure.value for name, figure in figures.items()}
        return Record(
            bench=bench.name,
            figures=values,
            targets={
                name: {targets[name].kind: targets[name].bound}
                for name in values
                if name in targets
            },
            missed=missed_targets(values, targets),
            environment=environment,
            intervals={
                name: [figure.low, figure.high, figure.n]
                for name, figure in figures.items()
                if figure.low is not None or figure.n is not None
            },
            quick=options.quick,
            seconds=round(time.perf_counter() - began, 3),
            command=command,
            date=date,
            units={name: figure.unit for name, figure in figures.items() if figure.unit},
        )

    if keep is not None:
        options = replace(options, keep=lambda measured: keep(record(measured)))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            measured = bench.run(options, progress)
        return record(measured)
    except WorkError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise WorkError(
            f"bench {bench.name}: must finish, got {type(error).__name__} "
            f"({Path(place.filename).name}, line {place.lineno}): {error}"
        ) from error


def _check_figures(measured: Mapping[str, float | Figure], where: str) -> dict[str, Figure]:
    if not measured:
        raise WorkError(f"{where}: must return at least one figure, got none")
    figures = {}
    for name, value in measured.items():
        check_name(name, where)
        try:
            figures[name] = value if isinstance(value, Figure) else Figure(float(value))
        except NonFiniteError as error:
            raise NonFiniteError(f"{where}: {name} must be finite, got {value}") from error
    return figures
