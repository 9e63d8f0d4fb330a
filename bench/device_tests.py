"""The test suite on the GPU at hand: what passed, what failed, what was not come to.

Three selections: tests that are marked `gpu`, of all folders, those of the kernels first; then all
other tests of the kernels, which run compiled where there is a GPU, and are compared with float64
there as elsewhere; then those that watch each access to memory, which take longest and say least.
They run in processes of their own, which a crash of the driver may take with it.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from kinetiq.bench.environment import package_checkout
from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import BenchOptions, Progress
from kinetiq.bench.steps import NO_GPU, Budget, Keep, Outcome
from kinetiq.errors import WorkError

LOG, VERDICTS = "tests.log", "tests.{}.ndjson"
_PLUGIN = "kinetiq.bench.verdicts"
_TIME_UP = "no time was left for this test"
_RANK = ("passed", "skipped", "failed")  # of a test with several verdicts the last counts
_OPTIONS = (  # the project's own, less those of plugins that a bare machine may lack
    *("-o", "addopts=", "--import-mode=importlib", "--strict-markers", "-q", "-ra", "--tb=short"),
    # What packages of that machine warn of is no verdict on ours.
    *("-o", "filterwarnings="),
    *("-p", "no:cacheprovider", "--continue-on-collection-errors"),
)


@dataclass(frozen=True)
class Selection:
    """Which tests, and what their figures are called.

    Args:
        name: of the selection.
        stem: of its figures.
        marks: expression over marks.
        path: folder in the checkout.
        seconds: without which it is not begun.
        rest: share of the time left that it leaves to what comes after it.
        processes: that share its tests, where pytest-xdist is installed.
        marked: whether its tests are marked `gpu`, so that other files need not be read.
    """

    name: str
    stem: str
    marks: str
    path: str
    seconds: float = 30.0
    rest: float = 0.0
    processes: int = 1
    marked: bool = True

    def limit(self, left: float) -> float:
        """Seconds that it may take when so many are left."""
        return max(self.seconds, left * (1.0 - self.rest))

    def files(self, root: Path) -> list[str]:
        """What pytest is to look into."""
        if not self.marked:
            return [self.path]
        found = [
            path
            for path in (root / self.path).rglob("test_*.py")
            if "mark.gpu" in path.read_text("utf-8")
        ]
        found.sort(key=lambda path: ("kernels" not in path.parts, path))
        return [str(path.relative_to(root)) for path in found] or [self.path]


SELECTIONS = (
    Selection("gpu", "gpu.tests", "gpu and not slow", "tests", rest=0.5),
    Selection(
        *("kernels", "gpu.tests.kernels", "not gpu and not slow", "tests/kernels"),
        rest=0.2,
        processes=8,  # most of the time is Triton's compiling
        marked=False,
    ),
    Selection("memory", "gpu.tests.memory", "gpu and slow", "tests/kernels"),
)


@dataclass(frozen=True)
class Verdict:
    """What became of one test; `why` is the reason of a skip, or the error."""

    test: str
    outcome: str
    why: str = ""


def measure_tests(
    options: BenchOptions, budget: Budget, progress: Progress, keep: Keep = lambda *_: None
) -> Outcome:
    """Run the selections on the GPU of `options`."""
    root = package_checkout()
    names = [f"tests: {selection.name}" for selection in SELECTIONS]
    outcome = Outcome()
    if not options.device.startswith("cuda"):
        outcome.leave_out(names, f"{NO_GPU} (the device is {options.device})")
    elif root is None or not (root / "tests").is_dir():
        outcome.leave_out(names, "needs a checkout, whose tests are run; found none")
    elif importlib.util.find_spec("pytest") is None:
        outcome.leave_out(names, "needs the package pytest")
    else:
        with _folder(options.out) as folder:
            run_selections(root, folder, options.device, budget, outcome, progress, keep=keep)
    return outcome


def run_selections(
    root: Path,
    folder: Path,
    device: str,
    budget: Budget,
    outcome: Outcome,
    progress: Progress,
    selections: Sequence[Selection] = SELECTIONS,
    keep: Keep = lambda *_: None,
) -> None:
    """Run selections of the tests of a checkout one after the other; logs stay in `folder`."""
    (folder / LOG).write_bytes(b"")
    for selection in progress.track(selections, "tests"):
        name = f"tests: {selection.name}"
        if why := budget.refusal(selection.seconds):
            outcome.leave_out([name], why)
            continue
        keep(outcome, name)
        limit = selection.limit(budget.left)
        try:
            collected, verdicts, ended = run_selection(root, folder, device, selection, limit)
        except WorkError as error:
            outcome.fail([name], str(error))
            continue
        left = not_run(collected, verdicts)
        if left and ended is not None:  # no failure of a test ends a run half way: the process died
            why = f"the process died here, exit status {ended}"
            verdicts.append(Verdict(left.pop(0), "failed", why))
        outcome.leave_out(left, _TIME_UP if ended is None else "the process died before this test")
        outcome.figures |= figures_of(selection, verdicts, left)
        outcome.details[selection.name] = {
            kind: [asdict(v) for v in verdicts if v.outcome == kind]
            for kind in ("failed", "skipped")
        }


def run_selection(
    root: Path, folder: Path, device: str, selection: Selection, seconds: float
) -> tuple[list[str], list[Verdict], int | None]:
    """Run one selection for at most so many seconds.

    Returns:
        The tests collected, verdicts, and the exit status, None if time was up.

    Raises:
        WorkError: pytest did not come to its tests, or found none.
    """
    path = folder.resolve() / VERDICTS.format(selection.name)
    words = [sys.executable, "-P", "-m", "pytest", "-p", _PLUGIN, "--verdicts", str(path)]
    words += [*_OPTIONS, "-m", selection.marks, *selection.files(root)]
    if selection.processes > 1 and importlib.util.find_spec("xdist") is not None:
        words += ["--numprocesses", str(selection.processes)]
    with (folder / LOG).open("ab") as log:
        ended = run_in_time(words, root, _environment(device), log, seconds)
    collected, verdicts = read_verdicts(path)
    if not collected and not verdicts:
        lines = (folder / LOG).read_text("utf-8", "replace").strip().splitlines() or [""]
        how = "was stopped" if ended is None else f"exit status {ended}"
        raise WorkError(f"pytest must find tests in {selection.path}, {how}: {lines[-1]}")
    return collected, verdicts, ended


def not_run(collected: Sequence[str], verdicts: Sequence[Verdict]) -> list[str]:
    """The tests without a verdict, in their order."""
    came_to = {verdict.test for verdict in verdicts}
    return [test for test in collected if test not in came_to]


def run_in_time(
    words: Sequence[str],
    root: Path,
    environment: dict[str, str],
    log: IO[bytes],
    seconds: float,
) -> int | None:
    """The exit status of a command, or None if time was up; what it has started ends with it."""
    process = subprocess.Popen(
        words, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing of its session is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_verdicts(path: Path) -> tuple[list[str], list[Verdict]]:
    """The tests collected, and one verdict a test: the worst that was said of it."""
    collected: list[str] = []
    found: dict[str, Verdict] = {}
    text = path.read_text("utf-8") if path.exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the line at which the process was killed
            continue
        if "collected" in entry:
            collected = entry["collected"]
            continue
        verdict = Verdict(**entry)
        former = found.get(verdict.test)
        if former is None or _RANK.index(verdict.outcome) > _RANK.index(former.outcome):
            found[verdict.test] = verdict
    return collected, list(found.values())


def figures_of(
    selection: Selection, verdicts: Sequence[Verdict], left: Sequence[str]
) -> dict[str, Figure]:
    """How many passed, failed, were skipped, and were not come to."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    n = max(1, len(verdicts) + len(left))
    figures = {f"{selection.stem}.{word}": Figure(counts[word], n=n) for word in _RANK}
    return figures | {f"{selection.stem}.not_run": Figure(len(left), n=n)}


def _environment(device: str) -> dict[str, str]:
    """Tests ask for "cuda", which is to be the GPU that was asked for."""
    index = device.partition(":")[2]
    if not index:
        return dict(os.environ)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    chosen = shown.split(",")[int(index)] if shown else index
    return os.environ | {"CUDA_VISIBLE_DEVICES": chosen}


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where logs go: the folder asked for, or one that is gone afterwards."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
