"""Everything that only a GPU can tell, in four parts that each end within eight minutes.

    kinetiq bench gpu --part tests|kernels|clips|controls --out DIR

`tests` runs the tests that need a GPU, and those of the kernels; `kernels` times every operator
against the other ways to compute the same, and says which launch settings are tuned for this GPU;
`clips` has seconds a clip and peak memory, ours and stock diffusers'; `controls` has what each
control costs, and whether the engine is right here. Nothing needs a network, a checkpoint that is
not embedded, or a package that draws.

What was not measured is named with its reason, on standard error and in `DIR/gpu_<part>.json`:
there is no GPU, no time was left, or it broke. `gpu.<part>.unmeasured` counts all of it, and
`gpu.<part>.failed` what broke. A part that measured nothing at all has not measured, and says so.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict

from kinetiq.bench.clips import measure_clips
from kinetiq.bench.control_costs import measure_controls
from kinetiq.bench.device_kernels import measure_kernels
from kinetiq.bench.device_tests import measure_tests
from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.kernels import _flush_buffer as flush_buffer
from kinetiq.bench.parts import make_folder
from kinetiq.bench.steps import Budget, Outcome, free_memory
from kinetiq.errors import MissingDependencyError, WorkError
from kinetiq.files import write_text

Measure = Callable[[BenchOptions, Budget, Progress], Outcome]
PARTS: Mapping[str, Measure] = {  # tests first: what the others hold in memory is not theirs
    "tests": measure_tests,
    "kernels": measure_kernels,
    "clips": measure_clips,
    "controls": measure_controls,
}
SECONDS = {"full": 440.0, "quick": 50.0}  # of a part, within which its last step has begun and ends
_NAMED = 40  # unmeasured things that are said at length


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
        outcome = PARTS[part](options, _budget(options), progress)
        _keep(part, outcome, options)
        print(report(part, outcome))  # noqa: T201  goes to standard error
        unmeasured |= outcome.unmeasured
        if outcome.figures:
            figures |= outcome.figures
            n = len(outcome.figures) + len(outcome.unmeasured)
            figures[f"gpu.{part}.unmeasured"] = Figure(len(outcome.unmeasured), n=n)
            figures[f"gpu.{part}.failed"] = Figure(len(outcome.failed), n=n)
        flush_buffer.cache_clear()
        free_memory(options.device)
    if not figures:
        what = "bench gpu" if options.part is None else f"bench gpu --part {options.part}"
        first = next(iter(unmeasured.values()), "there was nothing to measure")
        kind = WorkError if options.device.startswith("cuda") else MissingDependencyError
        raise kind(f"{what}: must measure something, {len(unmeasured)} unmeasured: {first}")
    return figures


def report(part: str, outcome: Outcome) -> str:
    """What was not measured, and why, a line each."""
    lines = [f"{part}: {len(outcome.figures)} figures, {len(outcome.unmeasured)} unmeasured"]
    named = list(outcome.unmeasured.items())
    lines += [f"unmeasured {name}: {why}" for name, why in named[:_NAMED]]
    if len(named) > _NAMED:
        lines.append(f"and {len(named) - _NAMED} more, all of them in gpu_{part}.json with --out")
    return "\n".join(lines)


def _budget(options: BenchOptions) -> Budget:
    return Budget(SECONDS["quick" if options.quick else "full"])


def _keep(part: str, outcome: Outcome, options: BenchOptions) -> None:
    if options.out is None:
        return
    entries = {
        "part": part,
        "figures": {name: asdict(figure) for name, figure in outcome.figures.items()},
        "unmeasured": outcome.unmeasured,
        "failed": outcome.failed,
        **outcome.details,
    }
    text = json.dumps(entries, indent=1, allow_nan=False) + "\n"
    write_text(options.out / f"gpu_{part}.json", text, "bench gpu")


BENCH = Bench("gpu", "everything that only a GPU can tell, in parts", measure, parts=tuple(PARTS))
