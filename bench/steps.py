"""Measurements that share a time budget: each runs if it can, and what does not run is named.

A step says how long it may take, and begins only while that much time is left, so that a run ends
when it was promised to. One that breaks is named with its error, and the next one goes on, unless
the GPU answers nothing any more: then all that follows is named. What is found is handed on after
every step, with the name of the next, so that a step which does not end takes nothing along.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Progress

NO_GPU = "needs an NVIDIA GPU"


@dataclass(frozen=True)
class Budget:
    """Seconds that a run may take, counted from now.

    Args:
        seconds: how many.
        clock: seconds, monotonic.
    """

    seconds: float
    clock: Callable[[], float] = time.perf_counter
    began: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "began", self.clock())

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.began + self.seconds - self.clock()

    def refusal(self, seconds: float) -> str:
        """Why nothing of so many seconds is begun; empty if there is time for it."""
        if seconds <= self.left:
            return ""
        return f"no time: may take {seconds:.0f} s, {max(self.left, 0.0):.0f} s were left"


@dataclass(frozen=True)
class Note:
    """What is to be known of a figure besides its value.

    Args:
        figure: its name.
        text: one line.
    """

    figure: str
    text: str


Found = Mapping[str, Figure] | Note


@dataclass(frozen=True)
class Step:
    """One measurement.

    Args:
        name: what is unmeasured without it.
        seconds: that it may take on a GPU of the H200's class.
        run: measures, given what its stage has built. It returns all figures at the end, or gives
            them one after the other: those given stay if it breaks later.
    """

    name: str
    seconds: float
    run: Callable[[Any], Mapping[str, Figure] | Iterable[Found]]


@dataclass(frozen=True)
class Stage:
    """Measurements of one thing, which is in memory while they run.

    Args:
        name: of the thing.
        seconds: that building it may take.
        build: makes it.
        steps: measure it, in this order.
        gpu: whether it needs a GPU.
    """

    name: str
    seconds: float
    build: Callable[[], Any]
    steps: Sequence[Step]
    gpu: bool = True


@dataclass
class Outcome:
    """What a part of a bench found.

    Args:
        figures: by name.
        unmeasured: name → why, of everything that was left out or broke.
        failed: names of those that broke.
        left: names of what was not come to yet.
        details: further findings for its file, ready for JSON.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def leave_out(self, names: Sequence[str], why: str) -> None:
        """Name what was not begun."""
        self.left = [name for name in self.left if name not in names]
        self.unmeasured |= dict.fromkeys(names, why)

    def fail(self, names: Sequence[str], why: str) -> None:
        """Name what broke."""
        self.leave_out(names, why)
        self.failed += names

    def take(self, found: Found) -> None:
        """Keep what a step has found."""
        if isinstance(found, Note):
            self.details.setdefault("notes", {})[found.figure] = found.text
        else:
            self.figures |= found


Keep = Callable[[Outcome, str], None]  # what was found so far, and what begins now


def run_stages(
    stages: Sequence[Stage],
    device: str,
    budget: Budget,
    progress: Progress,
    label: str,
    keep: Keep = lambda *_: None,
) -> Outcome:
    """Build each stage in turn, run its steps, and let go of it.

    Args:
        stages: what to measure.
        device: where.
        budget: shared by all of them.
        progress: shows how far it is.
        label: of the progress.
        keep: told what was found so far before anything is built or measured.
    """
    outcome = Outcome(left=[step.name for stage in stages for step in stage.steps])
    for stage in progress.track(stages, label):
        names = [step.name for step in stage.steps]
        if stage.gpu and not device.startswith("cuda"):
            outcome.leave_out(names, f"{NO_GPU} (the device is {device})")
            continue
        least = stage.seconds + min(step.seconds for step in stage.steps)
        if why := budget.refusal(least):
            outcome.leave_out(names, why)
            continue
        _run_stage(stage, device, budget, outcome, keep)
        free_memory(device)
        if why := lost(device):
            outcome.leave_out(outcome.left, why)
            break
    return outcome


def _run_stage(stage: Stage, device: str, budget: Budget, outcome: Outcome, keep: Keep) -> None:
    built: list[Any] = []
    names = [step.name for step in stage.steps]
    keep(outcome, f"{stage.name}: building")
    with failing(outcome, names):
        built.append(stage.build())
        require_device(device)
    if outcome.unmeasured.keys() >= set(names):
        return
    for step in stage.steps:
        if why := budget.refusal(step.seconds):
            outcome.leave_out([step.name], why)
            continue
        outcome.left = [name for name in outcome.left if name != step.name]
        keep(outcome, step.name)
        with failing(outcome, [step.name]):
            found = step.run(built[0])
            for part in [found] if isinstance(found, Mapping) else found:
                outcome.take(part)
            require_device(device)
        gc.collect()
        if lost(device):
            return


@contextlib.contextmanager
def failing(outcome: Outcome, names: Sequence[str]) -> Iterator[None]:
    """Inside, an error is kept as what broke these names."""
    try:
        yield
    except Exception as error:  # one that breaks must not take the others' time away
        outcome.fail(names, in_short(error))


def in_short(error: BaseException) -> str:
    """The class and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def free_memory(device: str) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.startswith("cuda"):
        with contextlib.suppress(RuntimeError):  # of a GPU that is lost, which `lost` tells
            torch.cuda.empty_cache()


def lost(device: str) -> str:
    """Why a GPU answers nothing any more, empty if it does.

    After an illegal access and its like every further call of the process fails with that error.
    """
    if not device.startswith("cuda"):
        return ""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"the GPU was lost before: {in_short(error)}"
    return ""


def require_device(device: str) -> None:
    """Wait for a GPU, so that an error of what was queued is that of the one who queued it.

    Raises:
        RuntimeError: whatever went wrong on it.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
