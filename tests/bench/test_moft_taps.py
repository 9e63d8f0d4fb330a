"""The bench of taps: which it reads, and that no tap is steered harder for the size of its features."""

import attrs
import pytest

from kinetiq.bench import moft_taps
from kinetiq.bench.harness import BenchOptions, Progress
from kinetiq.engine import Engine
from kinetiq.moft import Knots, load_channels
from kinetiq.taps import DEFAULT_TAP, find_tap


@pytest.fixture(scope="module")
def engine():
    with Engine.load("sprites") as engine:
        yield engine


def test_taps_are_blocks_and_attentions_of_the_network(engine):
    taps = moft_taps.choose_taps(engine)
    found = {name: find_tap(engine.checkpoint.unet, tap) for name, tap in taps.items()}
    assert found["block_1"].name == DEFAULT_TAP
    assert [name for name, tap in found.items() if tap.is_attention] == [
        "last_attention",
        "first_attention",
    ]
    assert {tap.block for tap in found.values() if tap.is_attention} == {DEFAULT_TAP}


def test_features_of_twice_the_size_weigh_a_quarter(engine):
    channels = load_channels(engine.checkpoint, engine.denoiser)
    doubled = {
        direction: Knots(knots.time, 2 * knots.value) for direction, knots in channels.knots.items()
    }
    twice = moft_taps.pan_strength(attrs.evolve(channels, knots=doubled))
    assert twice == pytest.approx(4 * moft_taps.pan_strength(channels))


@pytest.mark.slow
def test_a_small_run_reads_and_steers_at_every_tap(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(moft_taps, "STEPS", 3)
    figures = moft_taps.measure(BenchOptions(quick=True), Progress())
    for tap in ("block_1", "last_attention"):
        for name in ("weight", "neighbours", "motion_fidelity", "direction_accuracy"):
            assert f"moft_taps.{tap}.{name}" in figures
    assert figures["moft_taps.block_1.weight"].value == 1
    assert figures["moft_taps.last_attention.weight"].value != 1
