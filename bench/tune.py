"""Launch settings for the GPU at hand: each candidate checked, then timed, the best one kept.

The candidates of a kernel are a small grid that is written down here, laid over the settings that
it has now. An entry of the launch file (operator and key) is judged by all cases of
`kinetiq.bench.kernels` whose timed call asks for it: a candidate must be right in every one, also
in float32 where types share an entry, and its score is the geometric mean of its times over those
of the settings that it would replace. One case is in memory at a time. What a GPU takes that is not
in the file, and has not been tuned, `kinetiq.kernels._launch` says.

What is about to be launched is compiled before, in several processes, into Triton's cache on disk:
compiling takes longer than all else, and so it has half of the time that is left. An entry that is
not done in time stays as it is, and is named.

Where a whole temporal layer in one kernel beats the separate operators is measured likewise, after
the settings of all of them: "temporal_block_wins" in the launch file says from how many positions
on it does.
"""

import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path

import numpy as np
import torch

from kinetiq.bench.harness import Progress
from kinetiq.bench.kernels import (
    OURS,
    SEPARATE,
    SITES,
    USUAL,
    Case,
    Gate,
    Inputs,
    Machine,
    Outputs,
    Prepare,
    Run,
    Site,
    builders,
    has_block,
    layer_case,
    make_layer,
    timed_way,
)
from kinetiq.bench.kernels import describe as describe_case
from kinetiq.bench.steps import Budget, free_memory, in_short, lost
from kinetiq.errors import MissingDependencyError, RequestError, WorkError
from kinetiq.files import check_target, write_text
from kinetiq.kernels._compile import CompileCase, Request, compile_case
from kinetiq.kernels._launch import Table, architecture, choosing, launch_file, read_table
from kinetiq.progress import say_above_bar

Settings = dict[str, int]
Entry = tuple[str, str]  # operator and key of the launch file
Timer = Callable[[Mapping[str, Run]], Mapping[str, Sequence[float]]]
Launch = Callable[[], None]
ENDLESS = Budget(math.inf)
_ATTENTION = {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8)}
_GRADIENT = {"BLOCK_M": (32, 64), "BLOCK_N": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
_FRAMES = {"TILE": (4096, 8192, 16384), "num_warps": (2, 4, 8)}
_STREAM = {"TILE": (1024, 2048, 4096, 8192), "num_warps": (2, 4, 8)}
_PRODUCT = {"ROWS": (64, 128), "CHANNELS": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3)}
GRIDS: dict[Entry, Mapping[str, Sequence[int]]] = {  # key "*" is every key not named
    ("query_attention", "*"): {**_ATTENTION, "num_stages": (2, 3, 4)},
    ("query_attention_query_gradient", "*"): _GRADIENT,
    ("query_attention_key_gradient", "*"): _GRADIENT,
    ("query_attention_return_gradient", "*"): {"BLOCK": (512, 1024, 2048), "num_warps": (4, 8)},
    ("frame_attention", "*"): _FRAMES,
    ("frame_attention_controlled", "*"): _FRAMES,
    ("frame_attention_backward", "*"): _FRAMES,
    ("frame_attention_backward_controlled", "*"): _FRAMES,
    ("temporal_block", "*"): {
        "ROWS": (32, 64),
        "CHANNELS": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    ("motion_feature", "centre"): _STREAM,
    ("motion_feature", "gather"): _STREAM,
    ("motion_feature", "scatter"): {**_STREAM, "CHANNELS": (32, 64, 128)},
    ("motion_feature", "spread"): {**_STREAM, "CHANNELS": (32, 64, 128)},
    ("motion_feature", "region"): {**_STREAM, "BLOCK": (32, 64, 128)},
    ("motion_feature", "project"): {**_PRODUCT, "OUT": (32, 64)},
    ("motion_feature", "project_backward"): {**_PRODUCT, "OUT": (32, 64)},
    ("guided_step", "*"): {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)},
}
OPERATORS = (
    "frame_attention",
    "guided_step",
    "motion_feature",
    "query_attention",
    "temporal_block",
)
WINS = "temporal_block_wins"
_CLIP_ROWS = (1, 2, 4, 8, 16)  # halves of guidance of up to eight clips
_PROCESSES = 16  # that compile at most
_ROOM = 8 * 2**30  # bytes of the GPU's memory for each of them: a context and the largest case
_SHARE = 0.5  # of the time that is left, which compiling before the search may take
_KIND = 15.0  # seconds that a kind of layer may take to be compared with the separate operators
_WORTH = 0.98  # of the present time; less of a gain may be noise


@dataclass(frozen=True)
class Subject:
    """A case whose tensors are in memory.

    Args:
        prepare: makes the call under the settings that hold meanwhile; what is timed, and the
            outputs that it filled.
        complaint: what is wrong with outputs; empty if nothing is.
        device: where they are.
    """

    prepare: Callable[[], tuple[Run, Outputs]]
    complaint: Callable[[Outputs], str]
    device: str = "cpu"


@dataclass(frozen=True)
class Workload:
    """One call that settings are judged by.

    Args:
        name: of its case.
        build: puts the case into memory, where all of an operator's would not fit.
        asked: entries that the timed call asks for, with the settings that it gets.
        timed: whether it is timed, or only has to be right.
        launch: builds the case and launches the call once; another process can be given it.
        form: what its kernels depend on beside the number of positions; of two workloads of one
            form the second mostly finds compiled what the first has left.
    """

    name: str
    build: Callable[[], Subject]
    asked: Mapping[Entry, Settings]
    timed: bool = True
    launch: Launch | None = None
    form: tuple[object, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One candidate: its time over that of the present settings, or why it is out."""

    settings: Settings
    score: float | None = None
    rejected: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of one entry; `best` is `present` where nothing was worth a change.

    `searched` says whether it was searched to the end, for which there may be no time.
    """

    entry: Entry
    present: Settings
    best: Settings
    score: float
    trials: tuple[Trial, ...]
    searched: bool = True


def candidates(entry: Entry, present: Settings) -> list[Settings]:
    """The present settings with each point of the entry's grid laid over them, except themselves.

    Raises:
        WorkError: the grid has a name that the settings do not have.
    """
    operator, key = entry
    grid = GRIDS.get(entry) or GRIDS.get((operator, "*"), {})
    unknown = [name for name in grid if name not in present and name != "num_stages"]
    if unknown:
        raise WorkError(f"bench tune: {operator} {key} must have {unknown}, has {present}")
    points = itertools.product(*grid.values())
    laid = [present | dict(zip(grid, point, strict=True)) for point in points]
    return [settings for settings in laid if settings != present]


def asked_by(make: Prepare) -> dict[Entry, Settings]:
    """Entries that a prepared call asks for, not those of its preparation."""
    call = make()
    seen: dict[Entry, Settings] = {}

    def note(operator: str, key: str, found: Settings) -> Settings:
        seen[operator, key] = dict(found)
        return found

    with choosing(note):
        call()
    return seen


def not_searched(entry: Entry, present: Settings) -> Outcome:
    """What there is to say of an entry for which no time was left."""
    return Outcome(entry, present, present, 1.0, (), searched=False)


def search(
    entry: Entry, workloads: Sequence[Workload], timer: Timer, budget: Budget = ENDLESS
) -> Outcome:
    """Try every candidate of one entry on the workloads that ask for it, one after the other.

    Args:
        entry: what is searched.
        workloads: those that may ask for it.
        timer: takes the times of "present" and "candidate".
        budget: once it is used up nothing further is tried, and the entry counts as not searched.

    Raises:
        WorkError: a workload is wrong with the settings that it has now, or the GPU has no memory
            for it.
    """
    judges = [w for w in workloads if entry in w.asked]
    present = judges[0].asked[entry]
    tried = candidates(entry, present)
    rejected = [""] * len(tried)
    logs: list[list[float]] = [[] for _ in tried]
    for judge in judges:
        standing = [number for number, why in enumerate(rejected) if not why]
        verdicts: list[tuple[str, list[float]]] = []
        if budget.left > 0:
            some = [tried[number] for number in standing]
            with _in_memory(judge.name):
                verdicts = _judge(entry, judge, some, timer, budget)
        if len(verdicts) < len(standing):
            return not_searched(entry, present)
        for number, (why, ratios) in zip(standing, verdicts, strict=True):
            rejected[number] = why
            logs[number] += ratios
    trials = tuple(
        Trial(settings, rejected=why)
        if why
        else Trial(settings, score=math.exp(sum(ratios) / len(ratios)))
        for settings, why, ratios in zip(tried, rejected, logs, strict=True)
    )
    best, score = present, 1.0
    for trial in trials:
        if trial.score is not None and trial.score < min(score, _WORTH):
            best, score = trial.settings, trial.score
    return Outcome(entry, present, best, score, trials)


def _judge(
    entry: Entry, judge: Workload, tried: Sequence[Settings], timer: Timer, budget: Budget
) -> list[tuple[str, list[float]]]:
    """Of each candidate why it is out, and the logarithm of its time over that of the present.

    They are fewer than the candidates where there was no time for all.
    """
    subject = judge.build()
    usual, outputs = subject.prepare()
    if complaint := subject.complaint(outputs):
        raise WorkError(f"{judge.name}: must be right before it is tuned, it is {complaint}")
    in_time = itertools.takewhile(lambda _: budget.left > 0, tried)
    return [_try(entry, settings, judge, subject, usual, timer) for settings in in_time]


def _try(
    entry: Entry, settings: Settings, judge: Workload, subject: Subject, usual: Run, timer: Timer
) -> tuple[str, list[float]]:
    def choose(operator: str, key: str, found: Settings) -> Settings:
        return dict(settings) if (operator, key) == entry else found

    try:
        with choosing(choose):
            run, outputs = subject.prepare()
    except torch.OutOfMemoryError:  # which says nothing of the candidate
        raise
    except _refusals() as error:  # too much shared memory, too many registers, and the like
        if why := lost(subject.device):
            raise WorkError(f"bench tune: {judge.name} with {_words(settings)}: {why}") from error
        return f"{judge.name}: {type(error).__name__}: {_first_line(error)}", []
    if complaint := subject.complaint(outputs):
        return f"{judge.name}: {complaint}", []
    if not judge.timed:
        return "", []
    times = timer({"present": usual, "candidate": run})
    medians = {name: float(np.median(taken)) for name, taken in times.items()}
    return "", [math.log(medians["candidate"] / medians["present"])]


@contextlib.contextmanager
def _in_memory(name: str) -> Iterator[None]:
    """Inside, one case is in memory, which is free again behind it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise WorkError(
            f"bench tune: {name}: must fit into the GPU's memory, got: {_first_line(error)}; end "
            "what else runs there, or name other operators by --operator"
        ) from error
    finally:
        free_memory("cuda")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _refusals() -> tuple[type[Exception], ...]:
    from triton.errors import TritonError

    return (RuntimeError, TritonError)


def workloads_of(
    machine: Machine, operator: str, seed: int = 0, budget: Budget = ENDLESS
) -> list[Workload]:
    """All cases of one operator: timed in bf16, and required to be right in fp32.

    Where a half type and float32 share an entry its candidates must run in both; an entry that
    float32 has for itself is left as it is. There are none where there is no time to see all: by
    some of them nothing could be judged.
    """
    found = []
    for element, build in _builds(machine, operator, seed):
        if budget.left <= 0:
            return []
        with _in_memory(f"{operator} in {element}"):
            name, asked = _survey(build)
        subject = functools.partial(_subject, machine, build)
        launch = functools.partial(_launch_once, build)
        timed, form = element == "bf16", (element, *_form(build))
        found.append(Workload(name, subject, asked, timed, launch, form))
    return found


def _form(build: Callable[[], Case]) -> tuple[object, ...]:
    """What the kernels of a case depend on beside its type and its number of positions."""
    assert isinstance(build, functools.partial)  # as `builders` makes them
    site, (_, _, *kind) = build.args[0], describe_case(build)
    return (site.frames, site.heads, site.d, *kind) if isinstance(site, Site) else (site, *kind)


def _builds(machine: Machine, operator: str, seed: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """The type of each case of an operator, and what builds it."""
    for element in ("bf16", "fp32"):
        models = builders(Inputs(machine.device, element, seed), everywhere=True)[operator]
        for build in itertools.chain.from_iterable(models.values()):
            yield element, build


def _launch_once(build: Callable[[], Case]) -> None:
    build().ways[OURS]()()


def _survey(build: Callable[[], Case]) -> tuple[str, dict[Entry, Settings]]:
    """The name of a case, and the entries that it asks for."""
    case = build()
    return case.name, asked_by(case.ways[OURS])


@dataclass
class Ahead:
    """Compiling in other processes, into Triton's cache, before anything is launched.

    What fails there is found again by the search, which is then only slower; so it is said and
    does no harm.

    Args:
        pool: of processes; None when they were ended.
        ended: launches whose compiling came to an end.
        compiled: those of them of which every kernel was compiled.
        error: why the first of the others was not.
    """

    pool: Executor | None
    ended: int = 0
    compiled: int = 0
    error: str = ""

    def compile(
        self,
        launches: Sequence[Launch],
        choices: Sequence[Mapping[Entry, Settings]],
        name: str,
        budget: Budget,
    ) -> None:
        """Compile all that some launches reach under each choice of settings.

        It takes a part of the time that is left at most, so that there is some for the search; and
        if nothing of all that ended could be compiled, it is for the last time.

        Args:
            launches: what another process can be given, the most important first.
            choices: settings of some entries; of the others they are those of the launch file.
            name: architecture to compile for.
            budget: of the whole search.
        """
        if self.pool is None or budget.left <= 0:
            return
        waiting: list[Future[tuple[int, str]]] = []
        outcomes = []
        try:
            for launch, chosen in itertools.product(launches, choices):
                waiting.append(self.pool.submit(compile_launch, launch, chosen, name))
        except BrokenExecutor as error:  # a process has died, as for want of memory
            outcomes.append((0, in_short(error)))
        most = None if math.isinf(budget.left) else max(0.0, budget.left * _SHARE)
        done = wait(waiting, most).done
        for one in waiting:
            one.cancel()
        outcomes += [_outcome(one) for one in waiting if one in done]
        self.ended += len(outcomes)
        self.compiled += sum(not why for _, why in outcomes)
        self.error = self.error or next((why for _, why in outcomes if why), "")
        if outcomes and not any(kernels for kernels, _ in outcomes):
            self.close()

    def close(self) -> None:
        """End the processes, and say what failed, unless that was done before."""
        if self.pool is None:
            return
        _end(self.pool)
        self.pool = None
        if self.error:
            say_above_bar(
                f"bench tune: {self.compiled} of {self.ended} launches compiled ahead; first "
                f"error: {self.error}"
            )


def _outcome(done: Future[tuple[int, str]]) -> tuple[int, str]:
    """What `compile_launch` returned, or why it did not."""
    error = done.exception()
    return done.result() if error is None else (0, in_short(error))


def compile_launch(launch: Launch, chosen: Mapping[Entry, Settings], name: str) -> tuple[int, str]:
    """Compile what a launch with these settings reaches, into Triton's cache; nothing is run.

    Returns:
        How many kernels were compiled, and why the first of the others was not.
    """

    def choose(operator: str, key: str, found: Settings) -> Settings:
        return dict(chosen.get((operator, key), found))

    case = CompileCase("", "", forward=True, launch=lambda _: launch())
    with choosing(choose):
        accounts = compile_case(case, Request("", "", forward=True, element="bf16", target=name))
    free_memory("cuda" if torch.cuda.is_available() else "cpu")
    errors = [account.error for account in accounts if account.error]
    return len(accounts) - len(errors), next(iter(errors), "")


@contextlib.contextmanager
def compilers(device: str) -> Iterator[Ahead | None]:
    """Processes that compile for a GPU, as many as it has room for; None where one is all."""
    free = torch.cuda.mem_get_info(device)[0]
    count = min(_cores(), _PROCESSES, free // _ROOM)
    if count < 2:
        yield None
        return
    # After a fork no process but the first could use the GPU.
    spawning = multiprocessing.get_context("spawn")
    ahead = Ahead(ProcessPoolExecutor(count, spawning, _begin))
    try:
        yield ahead
    finally:
        ahead.close()


def _cores() -> int:
    """CPU cores that this process may use, which need not be all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin() -> None:
    """What a process does before it compiles anything."""
    os.dup2(2, 1)  # compilers print to standard output, which belongs to the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process after its parent.

    A parent that is killed ends nobody, and who waits for work from it waits for ever, with the
    GPU's memory in its hands.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # the pool has started it
    connection.wait([parent.sentinel])
    os._exit(1)


def _end(pool: Executor) -> None:
    """End the processes of a pool at once, with what they are at.

    A pool that is shut down ends what runs and what is next, and the interpreter waits for it.
    Nothing is lost: a file of Triton's cache gets its name when it is whole.
    """
    # A pool says in no other way which they are, before Python 3.14.
    processes = dict(getattr(pool, "_processes", None) or {})
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes.values():
        process.terminate()


def _subject(machine: Machine, build: Callable[[], Case]) -> Subject:
    case = build()
    gate = Gate(case, machine.prepare(case.ways[USUAL])[1])
    prepare = functools.partial(machine.prepare, case.ways[OURS])
    return Subject(prepare, gate.complaint, machine.device)


def tune(
    device: str,
    path: Path,
    operators: Sequence[str],
    *,
    seed: int,
    progress: Progress,
    seconds: float = math.inf,
) -> Generator[Outcome, None, None]:
    """Tune operators on a GPU; a better entry is in the file before the next one is tried.

    Args:
        device: "cuda" or "cuda:N".
        path: launch file to change; a new one begins as a copy of the one in use.
        operators: names out of `OPERATORS`; none for all of them.
        seed: of the inputs.
        progress: shows how far it is.
        seconds: after which nothing further is tried.

    Yields:
        What became of each entry; of an operator that was not come to, as its entry "*".

    Raises:
        RequestError: there is no such operator, or `seconds` is not above 0.
        MissingDependencyError: `device` is not a GPU.
        InputError: the file is no launch file, or cannot be written.
        WorkError: a kernel is wrong with its present settings, or a case does not fit into memory.
    """
    unknown = [name for name in operators if name not in OPERATORS]
    if unknown:
        raise RequestError(
            f"bench tune: operators must be among {', '.join(OPERATORS)}, got {', '.join(unknown)}"
        )
    if not seconds > 0:  # which is not the same as at most 0: it may be no number
        raise RequestError(f"bench tune: seconds must be above 0, got {seconds}")
    if not device.startswith("cuda"):
        raise MissingDependencyError(
            f"bench tune: needs an NVIDIA GPU, whose settings it finds (the device is {device})"
        )
    check_target(path, "bench tune")
    load_table(path)  # a file that is none is found before the work, not after it
    budget = Budget(seconds)
    with torch.cuda.device(device), compilers(device) as ahead:
        machine, name = Machine(device), architecture()
        timer = functools.partial(machine.time, seconds=0.3)
        found: dict[Entry, Settings] = {}
        for operator in operators or OPERATORS:
            if ahead is not None:
                builds = _builds(machine, operator, seed)
                launches = [functools.partial(_launch_once, build) for _, build in builds]
                ahead.compile(launches, [{}], name, budget)
            workloads = workloads_of(machine, operator, seed, budget)
            if not workloads:
                yield not_searched((operator, "*"), {})
                continue
            for outcome in improve(workloads, timer, path, name, progress, budget, ahead):
                found[outcome.entry] = outcome.best
                yield outcome
            if operator == "temporal_block":
                yield from compare_blocks(machine, timer, path, name, found, seed, progress, budget)


def compare_blocks(
    machine: Machine,
    timer: Timer,
    path: Path,
    name: str,
    found: Mapping[Entry, Settings],
    seed: int,
    progress: Progress,
    budget: Budget = ENDLESS,
) -> Iterator[Outcome]:
    """Measure from how many positions on the kernel of a temporal layer pays; keep it in the file.

    Args:
        machine: where.
        timer: takes the times of "kernel" and "separate".
        path: launch file to change.
        name: architecture that it is for.
        found: settings that were found a moment ago, and are not what the package has read.
        seed: of the inputs.
        progress: shows how far it is.
        budget: of the whole search.

    Yields:
        An entry for each type and each kind of site; its settings are POSITIONS, and a trial's
        score is the kernel's time over that of the separate operators.
    """
    sites: dict[tuple[int, int, int], list[Site]] = {}
    for site in filter(has_block, SITES):
        sites.setdefault((site.frames, site.heads, site.d), []).append(site)
    asked = [(kind, element) for kind in sites for element in ("bf16", "fp16")]
    for kind, element in progress.track(asked, "tune temporal_block_wins"):
        frames, heads, d = kind
        entry = (WINS, f"frames{frames}_heads{heads}_d{d}_{element}")
        if budget.refusal(_KIND):
            yield not_searched(entry, {})
            continue
        inputs = Inputs(machine.device, element, seed)
        with _in_memory(" ".join(entry)):
            trials = tuple(
                compare_block(replace(site, rows=rows), inputs, machine, timer, found)
                for site in sites[kind]
                for rows in _CLIP_ROWS
            )
        least = least_winning(trials)
        table = load_table(path)
        before = table.get(WINS, {}).get(name, {}).get(entry[1])
        best = {"POSITIONS": least}
        if before != best:  # that it never wins is written too: then it was measured
            write_table(path, with_entry(table, entry, name, best))
        scores = [t.score for t in trials if t.score and t.settings["POSITIONS"] == least]
        yield Outcome(entry, before or {"POSITIONS": 0}, best, max(scores, default=1.0), trials)


def compare_block(
    site: Site, inputs: Inputs, machine: Machine, timer: Timer, found: Mapping[Entry, Settings]
) -> Trial:
    """The kernel itself against the separate operators, on a layer as the engine gives it one."""
    positions = {"POSITIONS": site.rows * site.tokens}
    layer, embedding = make_layer(site, inputs, motion=False)
    case = layer_case(site, inputs.element, layer, embedding)
    gate = Gate(case, machine.prepare(case.ways[USUAL])[1])

    def choose(operator: str, key: str, present: Settings) -> Settings:
        return dict(found.get((operator, key), present))

    with choosing(choose):
        try:
            kernel, outputs = machine.prepare(timed_way(lambda: layer.by_kernel, (layer.x,)))
        except torch.OutOfMemoryError:
            raise
        except _refusals() as error:
            why = f"{case.name}: {type(error).__name__}: {_first_line(error)}"
            return Trial(positions, rejected=why)
        if complaint := gate.complaint(outputs):
            return Trial(positions, rejected=f"{case.name}: {complaint}")
        separate = machine.prepare(case.ways[SEPARATE])[0]
        times = timer({"separate": separate, "kernel": kernel})
    ratio = float(np.median(times["kernel"]) / np.median(times["separate"]))
    return Trial(positions, score=ratio)


def least_winning(trials: Sequence[Trial]) -> int:
    """The least number of positions from which on the kernel won wherever it was tried; 0: none."""
    least = 0
    for trial in sorted(trials, key=lambda t: t.settings["POSITIONS"], reverse=True):
        if trial.score is None or trial.score >= _WORTH:
            break
        least = trial.settings["POSITIONS"]
    return least


def improve(
    workloads: Sequence[Workload],
    timer: Timer,
    path: Path,
    name: str,
    progress: Progress,
    budget: Budget = ENDLESS,
    ahead: Ahead | None = None,
) -> Iterator[Outcome]:
    """Search every entry that a timed workload asks for, and keep what is better in the file.

    Args:
        workloads: of one operator.
        timer: takes the times of "present" and "candidate".
        path: launch file to change.
        name: architecture that it is for.
        progress: shows how far it is.
        budget: of the whole search.
        ahead: processes that compile; None: nothing is compiled before it is launched.

    Raises:
        WorkError: see `search`.
    """
    entries = sorted({entry for w in workloads if w.timed for entry in w.asked})
    for entry in progress.track(entries, "tune"):
        if ahead is not None:
            judges = _each_form_first([w for w in workloads if entry in w.asked])
            launches = [w.launch for w in judges if w.launch is not None]
            tried = [{entry: settings} for settings in candidates(entry, judges[0].asked[entry])]
            ahead.compile(launches, tried, name, budget)
        outcome = search(entry, workloads, timer, budget)
        if outcome.best != outcome.present:
            write_table(path, with_entry(load_table(path), entry, name, outcome.best))
        yield outcome


def _each_form_first(workloads: Sequence[Workload]) -> list[Workload]:
    """One of each form, then the others, which find most of it compiled."""
    first = {workload.form: workload for workload in reversed(workloads)}
    return sorted(workloads, key=lambda workload: workload is not first[workload.form])


def with_entry(table: Table, entry: Entry, name: str, settings: Settings) -> Table:
    """A copy of `table` in which an architecture has these settings for an entry."""
    operator, key = entry
    targets = table.get(operator, {})
    keys = {**targets.get(name, {}), key: settings}
    return {**table, operator: {**targets, name: keys}}


def load_table(path: Path) -> Table:
    """The launch file at `path`, or the one in use where there is none yet.

    Raises:
        InputError: it is not operator → architecture → key → settings.
    """
    return read_table(path if path.exists() else launch_file())


def write_table(path: Path, table: Table) -> None:
    """Write a launch file, one line an entry; it is replaced when it is whole.

    Raises:
        OutputError: it cannot be written.
    """
    operators = []
    for operator, targets in table.items():
        blocks = []
        for target, keys in targets.items():
            lines = ",\n".join(f'      "{key}": {json.dumps(keys[key])}' for key in keys)
            blocks.append(f'    "{target}": {{\n{lines}\n    }}')
        operators.append(f'  "{operator}": {{\n' + ",\n".join(blocks) + "\n  }")
    write_text(path, "{\n" + ",\n".join(operators) + "\n}\n", "bench tune")


def describe(outcome: Outcome) -> str:
    """One line a person can read."""
    operator, key = outcome.entry
    if not outcome.searched:
        return f"{operator} {key}: left as it is, no time for it"
    out = sum(bool(trial.rejected) for trial in outcome.trials)
    tried = f"{len(outcome.trials)} tried, {out} of them out"
    if outcome.best == outcome.present:
        return f"{operator} {key}: kept {_words(outcome.present)}; {tried}"
    gain = f"{outcome.score:.2f} of the time of {_words(outcome.present)}"
    return f"{operator} {key}: {_words(outcome.best)}, {gain}; {tried}"


def _words(settings: Settings) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())
