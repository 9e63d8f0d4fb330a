"""The table of kernels on the GPU at hand within a time budget, and which launch settings it had.

What is measured is what `kinetiq.bench.kernels` measures, most telling cases first: those with a
target, of which each operator's first one at AnimateDiff, then every other site in bf16, then the
other models' first cases, then fp16. Contestants that are compiled first take part in a case with a
target while there is time for all further ones of that kind, and in any other while there is time
for all that follows: there are so many that a target would else never meet them.

A launch setting is its own where the launch file has an entry for this very architecture and key,
taken over where it has one for an older architecture of the generation, else the rule's, which
every GPU can run.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from kinetiq.bench import kernels
from kinetiq.bench.figures import Figure, load_targets
from kinetiq.bench.harness import BenchOptions, Progress
from kinetiq.bench.kernels import Line, Machine, Plan, Roof
from kinetiq.bench.steps import (
    NO_GPU,
    Budget,
    Keep,
    Outcome,
    failing,
    free_memory,
    in_short,
    lost,
    require_device,
)
from kinetiq.errors import InputError
from kinetiq.kernels._launch import (
    DEFAULT,
    Table,
    architecture,
    choosing,
    find_entry,
    launch_file,
    read_table,
)

LAUNCH = "kernels: launch settings"
_CASE, _COMPILED = 4.0, 40.0  # seconds that a case may take, and one with what is compiled first
_TIMED = 1.0  # seconds of its rounds
_NO_TIME = "no time was left to compile"
_MAIN = "animatediff"

Asked = tuple[str, str]  # operator and key of the launch file


def measure_kernels(
    options: BenchOptions, budget: Budget, progress: Progress, keep: Keep = lambda *_: None
) -> Outcome:
    """Measure as many cases as there is time for; a case that failed is named and counted."""
    outcome = Outcome()
    if not options.device.startswith("cuda"):
        plans = kernels.plan("cuda", quick=options.quick, seed=options.seed)
        names = [LAUNCH, *(describe(plan) for plan in plans)]
        outcome.leave_out(names, f"{NO_GPU} (the device is {options.device})")
        return outcome
    plans = kernels.plan(options.device, quick=options.quick, seed=options.seed)
    names = [LAUNCH, *(describe(plan) for plan in plans)]
    with failing(outcome, names), torch.cuda.device(options.device):
        machine = Machine(options.device)
        roof = machine.roof(sorted({plan.element for plan in plans}))
        names.clear()  # from here on what breaks is named by itself
        run_plans(plans, machine, roof, options, budget, outcome, progress, keep)
    return outcome


def run_plans(
    plans: Sequence[Plan],
    machine: Machine,
    roof: Roof,
    options: BenchOptions,
    budget: Budget,
    outcome: Outcome,
    progress: Progress,
    keep: Keep = lambda *_: None,
) -> None:
    """Run the cases in their order while time lasts, and look at the settings they ask for."""
    asked: dict[Asked, None] = {}
    lines: list[Line] = []
    outcome.figures["kernels.roof.copy"] = Figure(roof.bytes_per_second / 1e9, unit="GB/s")
    for element, rate in roof.flops_per_second.items():
        outcome.figures[f"kernels.roof.{element}"] = Figure(rate / 1e12, unit="TFLOP/s")

    def note(operator: str, key: str, found: dict[str, int]) -> dict[str, int]:
        asked[operator, key] = None
        return found

    ordered = in_order(plans)
    outcome.left = [describe(plan) for plan in ordered]
    affordable = within(ordered, budget, outcome, keep)
    shown = progress.track(affordable, "kernels", len(plans))
    with choosing(note):
        cases = _run_all(shown, machine, roof, outcome)
        for found in kernels._follow(cases, options.out):  # noqa: SLF001  one bench, two ways
            lines += found
            outcome.figures |= kernels.figures_of(found)
            outcome.figures["kernels.failed"] = Figure(len(outcome.failed), n=len(plans))
    if options.out is not None:
        kernels._write(options.out, lines)  # noqa: SLF001
    print(kernels.render(lines))  # noqa: T201  goes to standard error
    try:
        settings = sort_settings(list(asked), read_table(launch_file()), architecture())
    except InputError as error:
        outcome.fail([LAUNCH], in_short(error))
        return
    outcome.details["launch"] = settings
    for word, names in settings.items():
        outcome.figures[f"gpu.launch.{word}"] = Figure(len(names), n=max(1, len(asked)))


def _run_all(
    plans: Iterable[Plan], machine: Machine, roof: Roof, outcome: Outcome
) -> Iterator[list[Line]]:
    """The lines of each case; one that failed is named before the next one begins.

    Where the GPU answers nothing any more it ends, and all that is left is named.
    """
    for plan in plans:
        name = describe(plan)
        found: list[Line] = []
        with failing(outcome, [name]):
            found = kernels.run_plan(plan, machine, roof, _TIMED)
            require_device(machine.device)
        for line in found:
            if line.failed and name not in outcome.failed:
                outcome.fail([name], f"{line.contestant}: {line.failed}")
        ratio = f"{stem(plan)}.ratio_to_best"
        if (rivals := kernels.untimed_rivals(found)) and ratio in load_targets():
            names = ", ".join(line.contestant for line in rivals)
            why = f"{rivals[0].contestant}: {rivals[0].skipped}"
            outcome.leave_out([ratio], f"needs all other ways, {names} not timed: {why}")
        yield found
        free_memory(machine.device)
        if why := lost(machine.device):
            outcome.leave_out(outcome.left, why)
            return


def in_order(plans: Sequence[Plan]) -> list[Plan]:
    """The most telling cases first; those alike stay in the order of the operators."""
    wanted = _targeted(plans)

    def rank(plan: Plan) -> tuple[int, bool]:
        first_of_main = not plan.uncompiled and _site(plan).startswith(_MAIN)
        if stem(plan) in wanted:
            return 0, not first_of_main
        if plan.element == "fp16":
            return 3, False
        if plan.uncompiled:
            return 1, False
        return (0 if first_of_main else 2), False

    return sorted(plans, key=rank)


def stem(plan: Plan) -> str:
    """What the figures of a case begin with, told before it is built."""
    return kernels.stem(plan.build, plan.element)


def _targeted(plans: Sequence[Plan]) -> set[str]:
    """The stems of cases that have a target."""
    names = load_targets()
    stems = {stem(plan) for plan in plans}
    return {one for one in stems if any(name.startswith(f"{one}.") for name in names)}


def within(
    plans: Sequence[Plan], budget: Budget, outcome: Outcome, keep: Keep = lambda *_: None
) -> Iterator[Plan]:
    """Those that there is time for when their turn comes, compiled ones where time allows it."""
    wanted = _targeted(plans)
    for place, plan in enumerate(plans):
        if why := budget.refusal(_CASE):
            outcome.leave_out([describe(plan)], why)
            continue
        outcome.left = [name for name in outcome.left if name != describe(plan)]
        keep(outcome, describe(plan))
        following = plans[place + 1 :]
        if stem(plan) in wanted:
            following = [one for one in following if stem(one) in wanted]
        rest = _CASE * len(following)
        if not plan.uncompiled and budget.refusal(rest + _COMPILED):
            outcome.leave_out([f"{describe(plan)}, compiled contestants"], _NO_TIME)
            yield replace(plan, uncompiled=_NO_TIME)
        else:
            yield plan


def describe(plan: Plan) -> str:
    """A case in words before it is built."""
    return " ".join(["kernels:", *kernels.describe(plan.build), plan.element])


def _site(plan: Plan) -> str:
    return kernels.describe(plan.build)[1]


def sort_settings(asked: Sequence[Asked], table: Table, name: str) -> dict[str, list[str]]:
    """Which entries are of this architecture, which are another's, which are the rule's.

    One of its own need not be tuned: what the package says was written without a GPU.

    Args:
        asked: operators and keys that launches asked for.
        table: the launch file.
        name: of the architecture.
    """
    found: dict[str, list[str]] = {"own": [], "taken_over": [], "by_rule": []}
    for operator, key in sorted(asked):
        entry = find_entry(name, key, table.get(operator, {}))
        place = DEFAULT if entry is None else entry[0]
        word = {DEFAULT: "by_rule", name: "own"}.get(place, "taken_over")
        found[word].append(f"{operator} {key}")
    return found
