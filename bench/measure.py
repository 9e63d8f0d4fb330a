"""Time and memory, measured so that the numbers can be compared.

Times of two candidates are taken in turn within one run, so that whatever else the machine does
falls on both. Memory is the peak of a fresh process, or of the GPU's allocator.
"""

import multiprocessing
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from kinetiq.bench.figures import Figure
from kinetiq.errors import RequestError, WorkError

Around = Callable[[], AbstractContextManager[object]]
_State = TypeVar("_State")
_RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, and the values that a fifth lie below and above."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class TimeRatio:
    """Seconds of ours and of the baseline, and how many times the baseline ours takes.

    `ratio` is that of the medians; `low` and `high` are its 95 % interval over `repeats` pairs.
    """

    ours: Timing
    baseline: Timing
    ratio: float
    low: float
    high: float
    repeats: int

    @property
    def figure(self) -> Figure:
        """The ratio, as a bench returns it."""
        return Figure(self.ratio, self.low, self.high, n=self.repeats)


@dataclass(frozen=True)
class PeakMemory:
    """Bytes in use before a call, and at most during it."""

    before: int
    peak: int

    @property
    def growth(self) -> int:
        """Bytes that the call itself needed at most."""
        return self.peak - self.before


def time_ratio(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    repeats: int,
    warmup: int = 1,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    around_ours: Around = nullcontext,
    around_baseline: Around = nullcontext,
) -> TimeRatio:
    """Time two functions in turn: ours, baseline, ours, baseline, and so on.

    Args:
        ours: the candidate.
        baseline: what it is compared with.
        repeats: how many pairs are timed.
        warmup: how many pairs are run before, untimed.
        device: on "cuda" the clock waits until the GPU is done.
        clock: seconds, monotonic.
        around_ours: set up before each call and torn down after it, untimed.
        around_baseline: likewise.

    Returns:
        Seconds of both, and their ratio. Its interval is a bootstrap over the pairs
        (Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3).

    Raises:
        RequestError: `repeats` is below 1, or `warmup` below 0.
        WorkError: the baseline takes less time than the clock can tell.
    """
    if repeats < 1:
        raise RequestError(f"time_ratio: repeats must be at least 1, got {repeats}")
    if warmup < 0:
        raise RequestError(f"time_ratio: warmup must be at least 0, got {warmup}")
    sides = ((ours, around_ours), (baseline, around_baseline))
    for _ in range(warmup):
        for call, around in sides:
            with around():
                call()
    pairs = np.array(
        [[_seconds(*side, device, clock) for side in sides] for _ in range(repeats)]
    )  # [repeats, 2]
    medians = np.median(pairs, axis=0)
    if medians[1] <= 0:
        raise WorkError("time_ratio: the baseline must take time, got 0 s; do more in one call")
    picks = np.random.default_rng(0).integers(repeats, size=(_RESAMPLES, repeats))
    resampled = np.median(pairs[picks], axis=1)  # [resamples, 2]
    ratios = resampled[:, 0] / np.maximum(resampled[:, 1], np.finfo(float).tiny)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return TimeRatio(
        ours=_timing(pairs[:, 0]),
        baseline=_timing(pairs[:, 1]),
        ratio=float(medians[0] / medians[1]),
        low=float(low),
        high=float(high),
        repeats=repeats,
    )


def peak_memory(
    prepare: Callable[[], _State], run: Callable[[_State], object], *, device: str = "cpu"
) -> PeakMemory:
    """Peak memory of `run(prepare())`, and what was in use after `prepare()`.

    On a CPU both run in a fresh process, because a process keeps pages that it has freed and a
    second measurement would see the first one's; both must be picklable (functions of a module,
    or `functools.partial` of them). On "cuda" they run here, and the allocator is asked.

    Raises:
        WorkError: the process died, as it does when memory runs out.
    """
    if device.startswith("cuda"):
        return _peak_on_gpu(prepare, run, device)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(_peak_here, prepare, run).result()
        except BrokenProcessPool as error:
            raise WorkError(
                "peak_memory: the measured process must finish, but it died; "
                "did it run out of memory?"
            ) from error


def _seconds(
    call: Callable[[], object], around: Around, device: str, clock: Callable[[], float]
) -> float:
    with around():
        _synchronise(device)
        start = clock()
        call()
        _synchronise(device)
        return clock() - start


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _timing(seconds: np.ndarray) -> Timing:
    p20, p50, p80 = (float(value) for value in np.percentile(seconds, [20, 50, 80]))
    return Timing(p20, p50, p80)


def _peak_on_gpu(
    prepare: Callable[[], _State], run: Callable[[_State], object], device: str
) -> PeakMemory:
    state = prepare()
    _synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(state)
    _synchronise(device)
    return PeakMemory(before, torch.cuda.max_memory_allocated(device))


def _peak_here(prepare: Callable[[], _State], run: Callable[[_State], object]) -> PeakMemory:
    state = prepare()
    before = _forget_peak()
    run(state)
    return PeakMemory(before, _peak_of_process())


def _forget_peak() -> int:
    """Bring the process's peak down to what it uses now, where the system can; that peak."""
    if platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    return _peak_of_process()


def _peak_of_process() -> int:
    if platform.system() == "Linux":
        # Not ru_maxrss: across an exec Linux hands the parent's peak on to the child.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    import resource  # there is none on Windows

    peak_units = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_units * (1 if platform.system() == "Darwin" else 1024)
