import contextlib
import functools
import operator
import os

import numpy as np
import pytest

from kinetiq.bench.measure import PeakMemory, peak_memory, time_ratio
from kinetiq.errors import RequestError, WorkError


class Work:
    """Two functions that take given seconds on a clock of their own, and their call log."""

    def __init__(self, ours, baseline):
        self.now, self.log = 0.0, []
        self.seconds = {"ours": iter(ours), "baseline": iter(baseline)}

    def call(self, name):
        self.log.append(name)
        self.now += next(self.seconds[name])

    def ratio(self, repeats, warmup=0):
        ours, baseline = (functools.partial(self.call, name) for name in ("ours", "baseline"))
        return time_ratio(ours, baseline, repeats=repeats, warmup=warmup, clock=lambda: self.now)


def test_a_constant_ratio_is_exact():
    ratio = Work([3.0] * 5, [2.0] * 5).ratio(5)
    assert (ratio.ratio, ratio.low, ratio.high, ratio.repeats) == (1.5, 1.5, 1.5, 5)
    assert (ratio.figure.value, ratio.figure.n) == (1.5, 5)


def test_calls_are_interleaved_and_warmup_comes_first():
    work = Work([9.0, 9.0, 1.0, 1.0, 1.0], [7.0, 7.0, 2.0, 2.0, 2.0])
    assert work.ratio(3, warmup=2).ratio == 0.5
    assert work.log == ["ours", "baseline"] * 5


def test_what_is_set_up_around_a_call_is_not_timed():
    now, log = [0.0], []

    @contextlib.contextmanager
    def around(name):
        now[0] += 100.0
        log.append(f"{name} in")
        yield
        now[0] += 100.0
        log.append(f"{name} out")

    def work(name, seconds):
        log.append(name)
        now[0] += seconds

    ratio = time_ratio(
        lambda: work("ours", 3.0),
        lambda: work("baseline", 2.0),
        repeats=2,
        warmup=1,
        clock=lambda: now[0],
        around_ours=lambda: around("ours"),
        around_baseline=lambda: around("baseline"),
    )
    assert (ratio.ours.p50, ratio.baseline.p50) == (3.0, 2.0)
    sides = ("ours", "baseline")
    assert log == [word for side in sides for word in (f"{side} in", side, f"{side} out")] * 3


def test_percentiles_are_those_of_each_side():
    ours, baseline = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 6
    ratio = Work(ours, baseline).ratio(6)
    assert (ratio.ours.p20, ratio.ours.p50, ratio.ours.p80) == pytest.approx((1.0, 2.5, 4.0))
    assert (ratio.baseline.p20, ratio.baseline.p80) == (1.0, 1.0)
    assert ratio.ratio == 2.5


def test_one_slow_moment_does_not_move_the_ratio_of_medians():
    assert Work([1.0, 1.0, 50.0], [1.0, 1.0, 1.0]).ratio(3).ratio == 1.0


def test_load_that_falls_on_both_cancels_in_the_interval():
    """Pairs are drawn together: drawn apart, the interval would be about as wide as the load."""
    load = np.random.default_rng(0).uniform(1.0, 4.0, size=20)
    ratio = Work(1.2 * load, load).ratio(20)
    assert ratio.low == pytest.approx(1.2) and ratio.high == pytest.approx(1.2)


def test_the_interval_is_about_as_wide_as_theory_has_it():
    """Median of n normal times: its deviation is 1.2533 sigma / sqrt(n)."""
    noise = np.random.default_rng(1).normal(1.0, 0.1, size=200)
    ratio = Work(noise, [1.0] * 200).ratio(200)
    width = 2 * 1.96 * 1.2533 * 0.1 / 200**0.5
    assert 0.6 * width < ratio.high - ratio.low < 1.5 * width
    assert ratio.low < ratio.ratio < ratio.high


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"repeats": 1, "warmup": -1}, "warmup must be at least 0, got -1"),
    ],
)
def test_counts_are_checked(counts, message):
    with pytest.raises(RequestError, match=message):
        time_ratio(int, int, **counts)


def test_a_baseline_that_takes_no_time_has_no_ratio():
    with pytest.raises(WorkError, match="the baseline must take time, got 0 s"):
        Work([1.0], [0.0]).ratio(1)


def test_peak_memory_sees_the_call_and_not_its_preparation():
    """`run` holds 64 MiB; `prepare` held 256 MiB for a moment, which must be forgotten."""
    size, moment = 64 * 2**20, 256 * 2**20
    prepare = functools.partial(eval, f"(len(b'x' * {moment}), {size})[1]")
    peak = peak_memory(prepare, functools.partial(operator.mul, b"x"))
    assert 0.95 * size < peak.growth < 1.2 * size
    assert peak.before > 2**20


def test_growth_is_peak_less_before():
    assert PeakMemory(before=3, peak=10).growth == 7


def test_a_measured_process_that_dies_is_told():
    with pytest.raises(WorkError, match="the measured process must finish, but it died"):
        peak_memory(int, os._exit)
