"""Everything that only a GPU can tell, in four parts that each end within eight minutes.

    kinetiq bench gpu --part tests|kernels|clips|controls --out DIR

`tests` runs the tests that need a GPU, and those of the kernels; `kernels` times every operator
against the other ways to compute the same, and says which launch settings are tuned for this GPU;
`clips` has seconds a clip and peak memory, ours and stock diffusers'; `controls` has what each
control costs, and whether the engine is right here. Nothing needs a network, a checkpoint that is
not embedded, or a package that draws.

What was not measured is named with its reason, on standard error and in `DIR/gpu_<part>.json`:
there is no GPU, no time was left, or it broke. `gpu.<part>.unmeasured` counts all of it, and
`gpu.<part>.failed` what broke. A figure that has a target and was not measured is among them. A
part that measured nothing at all has not measured, and says so.

The file and the part's record are written anew before each measurement. One that does not end is
cut off with the whole run, 40 s after the part was to be over, and counts as failed in both.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

from kinetiq.bench.clips import measure_clips
from kinetiq.bench.control_costs import measure_controls
from kinetiq.bench.device_kernels import measure_kernels
from kinetiq.bench.device_tests import measure_tests
from kinetiq.bench.figures import Figure, load_targets
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.kernels import _flush_buffer as flush_buffer
from kinetiq.bench.parts import make_folder
from kinetiq.bench.steps import NO_GPU, Budget, Keep, Outcome, free_memory
from kinetiq.errors import MissingDependencyError, WorkError
from kinetiq.files import write_text

Measure = Callable[[BenchOptions, Budget, Progress, Keep], Outcome]
PARTS: Mapping[str, Measure] = {  # tests first: what the others hold in memory is not theirs
    "tests": measure_tests,
    "kernels": measure_kernels,
    "clips": measure_clips,
    "controls": measure_controls,
}
SECONDS = {"full": 440.0, "quick": 50.0}  # of a part, within which its last step has begun and ends
_GRACE = 40.0  # seconds after which a part is cut off
_NAMED = 40  # unmeasured things that are said at length
_OF_PART: Mapping[str, tuple[str, ...]] = {  # first words of the figures that have targets
    "tests": ("gpu.tests.",),
    "kernels": ("gpu.kernels.", "kernels."),
    "clips": ("gpu.animatediff.", "gpu.zeroscope.", "gpu.embedded.", "gpu.clips."),
    "controls": ("gpu.query_cost.", "gpu.agreement.", "gpu.controls."),
}
_CPU = "cpu_"  # in the last word of figures of `kernels` that are a CPU's


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Measure one part, or all of them one after the other.

    Raises:
        MissingDependencyError: there is no GPU, and without one nothing of it can be measured.
        WorkError: nothing was measured for another reason.
        OutputError: the folder cannot be written.
    """
    figures: dict[str, Figure] = {}
    unmeasured: dict[str, str] = {}
    if options.out is not None:
        make_folder(options.out)
    for part in PARTS if options.part is None else [options.part]:
        seconds = _seconds(options)
        with cut_off(part, options, seconds + _GRACE) as keep:
            outcome = PARTS[part](options, Budget(seconds), progress, keep)
        name_missing(part, outcome, options.device)
        _keep(part, outcome, options)
        print(report(part, outcome))  # noqa: T201  goes to standard error
        unmeasured |= outcome.unmeasured
        figures |= figures_of(part, outcome)
        flush_buffer.cache_clear()
        free_memory(options.device)
    if not figures:
        what = "bench gpu" if options.part is None else f"bench gpu --part {options.part}"
        first = next(iter(unmeasured.values()), "there was nothing to measure")
        kind = WorkError if options.device.startswith("cuda") else MissingDependencyError
        raise kind(f"{what}: must measure something, {len(unmeasured)} unmeasured: {first}")
    return figures


def figures_of(part: str, outcome: Outcome) -> dict[str, Figure]:
    """All figures of a part; none if it measured nothing."""
    if not outcome.figures:
        return {}
    n = len(outcome.figures) + len(outcome.unmeasured)
    return {
        **outcome.figures,
        f"gpu.{part}.unmeasured": Figure(len(outcome.unmeasured), n=n),
        f"gpu.{part}.failed": Figure(len(outcome.failed), n=n),
    }


def wanted_of(part: str) -> list[str]:
    """Names of the figures of a part that have a target."""
    return [
        name
        for name in load_targets()
        if name.startswith(_OF_PART[part]) and not name.rpartition(".")[2].startswith(_CPU)
    ]


def name_missing(part: str, outcome: Outcome, device: str) -> None:
    """Name the figures with a target that are not there: else nothing would say that it is missed.

    Where a reason is known already, it stays.
    """
    known = {*outcome.figures, *outcome.unmeasured, f"gpu.{part}.failed"}
    missing = [name for name in wanted_of(part) if name not in known]
    on_gpu = device.startswith("cuda")
    why = "what it is made of was not measured" if on_gpu else f"{NO_GPU} (the device is {device})"
    outcome.leave_out(missing, why)


@contextlib.contextmanager
def cut_off(part: str, options: BenchOptions, seconds: float) -> Iterator[Keep]:
    """Inside, what was found is kept, and the process ends if the block does not in time.

    Nothing less stops a call that waits for a GPU. The exit status is 1.

    Args:
        part: which one is measured.
        options: of the bench.
        seconds: after which it is cut off.
    """
    lock = threading.Lock()
    under_way: list[tuple[Outcome, str]] = []
    over = False

    def keep(outcome: Outcome, name: str) -> None:
        with lock:
            under_way[:] = [(outcome, name)]
            _keep(part, outcome, options, name)

    def stop() -> None:
        with lock:
            if over:
                return
            try:
                for outcome, name in under_way:
                    _end(part, outcome, name, options, seconds)
            finally:
                os._exit(1)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield keep
    finally:
        with lock:
            over = True
        timer.cancel()


def _end(part: str, outcome: Outcome, name: str, options: BenchOptions, seconds: float) -> None:
    """Keep what there is of a part that is cut off."""
    why = f"it did not end, and the run was stopped {seconds:.0f} s after the part began"
    outcome.fail([name], why)
    outcome.leave_out(outcome.left, "the run was stopped before")
    name_missing(part, outcome, options.device)
    print(f"bench gpu --part {part}: {name}: {why}", file=sys.stderr, flush=True)  # noqa: T201
    _keep(part, outcome, options)


def report(part: str, outcome: Outcome) -> str:
    """What was not measured, and why, a line each."""
    lines = [f"{part}: {len(outcome.figures)} figures, {len(outcome.unmeasured)} unmeasured"]
    named = list(outcome.unmeasured.items())
    lines += [f"unmeasured {name}: {why}" for name, why in named[:_NAMED]]
    if len(named) > _NAMED:
        lines.append(f"and {len(named) - _NAMED} more, all of them in gpu_{part}.json with --out")
    return "\n".join(lines)


def _seconds(options: BenchOptions) -> float:
    if options.seconds is not None:
        return options.seconds
    return SECONDS["quick" if options.quick else "full"]


def _keep(part: str, outcome: Outcome, options: BenchOptions, under_way: str = "") -> None:
    """Write what there is, as the part's file and as its record."""
    if options.out is None:
        return
    # Copies: what cuts a part off runs beside it.
    found = Outcome(
        dict(outcome.figures),
        dict(outcome.unmeasured),
        list(outcome.failed),
        list(outcome.left),
        dict(outcome.details),
    )
    entries = {
        "part": part,
        "figures": {name: asdict(figure) for name, figure in found.figures.items()},
        "unmeasured": found.unmeasured,
        "failed": found.failed,
        **found.details,
    }
    if under_way:
        entries |= {"under_way": under_way, "left": found.left}
    if found.figures:
        options.keep(figures_of(part, found))
    text = json.dumps(entries, indent=1, allow_nan=False) + "\n"
    write_text(options.out / f"gpu_{part}.json", text, "bench gpu")


BENCH = Bench("gpu", "everything that only a GPU can tell, in parts", measure, parts=tuple(PARTS))
