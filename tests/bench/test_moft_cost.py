"""The bench of what MOFT guidance costs: both ways are the same, and their parts are counted right."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from kinetiq.bench import moft_cost
from kinetiq.bench.harness import BenchOptions, Progress
from kinetiq.bench.measure import PeakMemory
from kinetiq.bench.query_cost import Loop
from kinetiq.denoiser import EagerDenoiser
from kinetiq.errors import WorkError

STEPS = 6
TINY = moft_cost.ANIMATEDIFF | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}


@pytest.fixture(scope="module")
def case():
    text = (5, tiny.CROSS_WIDTH)
    return moft_cost.make_case(
        Loop(tiny.tiny_animatediff(), frames=3, side=8, text_shape=text, steps=STEPS)
    )


def apart(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


def test_all_steps_of_both_ways_end_alike(case):
    wanted = moft_cost.run_released(case)
    rounding = 1e-4  # of float32, over all steps
    assert apart(moft_cost.run_ours(case, case.guidance), wanted) <= rounding
    # Shared keys and values, and guidance itself, make a difference that this would see.
    assert apart(moft_cost.run_ours(case, moft_cost.own_keys(case.guidance)), wanted) > 0.01
    still = replace(case, guidance=None)
    assert apart(run_unguided(still), wanted) > 0.01


def run_unguided(case):
    ((_, latents),) = moft_cost.denoise(
        [(0, case.loop.request(None, 0))],
        case.loop.denoiser,
        lambda _: case.loop.text,
        channels=4,
        device=case.loop.device,
        dtype=case.loop.dtype,
        max_clips=1,
    )
    return latents


def test_both_ways_have_the_same_gradient(case):
    assert 0 < moft_cost.require_agreement(case) <= 1e-4
    _, keys = moft_cost.released_keys(case, case.unguided, case.step)
    released = functools.partial(moft_cost.released_gradient, case, case.sample, case.step)
    assert apart(released(keys), released(None)) > 0.01
    assert apart(released(None, halves=1), released(None)) <= 1e-4
    network = case.loop.denoiser.network
    assert not [name for name, module in network.named_modules() if module._forward_hooks]


def test_ways_that_disagree_are_not_compared(case, monkeypatch):
    ours = moft_cost.our_gradient
    monkeypatch.setattr(moft_cost, "our_gradient", lambda *given: 1.001 * ours(*given))
    with pytest.raises(WorkError, match=r"must have the same gradient to 0.0001 .* got 0.00"):
        moft_cost.require_agreement(case)


def test_the_released_keys_are_those_from_the_taps_block_on(case):
    _, keys = moft_cost.released_keys(case, case.unguided, case.step)
    blocks = {name.partition(".attentions")[0] for name in keys}
    assert blocks == {"up_blocks.1", "up_blocks.2"}
    assert {name.rpartition(".")[2] for name in keys} == {"to_k", "to_v"}
    assert {len(rows) for rows in keys.values()} == {2}


@pytest.mark.parametrize("way", ["released", "shared", "own"])
def test_the_parts_are_counted_as_they_are_run(case, way, monkeypatch):
    """P, R, K and T, told apart by their rows, by where they end and by whether they are recorded."""
    seen = []
    for name in ("predict", "features"):
        run = getattr(EagerDenoiser, name)

        def spy(self, latents, *rest, run=run, name=name):
            seen.append((name, len(latents), latents.requires_grad))
            return run(self, latents, *rest)

        monkeypatch.setattr(EagerDenoiser, name, spy)
    parts = {
        "P": ("predict", 2, False),
        "R": ("predict", 2, True),
        "K": ("features", 1, False),
        "T": ("features", 1, True),
    }
    if way == "released":
        moft_cost.run_released(case)
    else:
        guidance = case.guidance if way == "shared" else moft_cost.own_keys(case.guidance)
        moft_cost.run_ours(case, guidance)
    counted = {part: seen.count(kind) for part, kind in parts.items() if kind in seen}
    assert counted == moft_cost.schedules(case)[way]
    assert sum(counted.values()) == len(seen)


def test_each_part_is_what_its_letter_says(case, monkeypatch):
    for name, call in moft_cost.parts_of(case).items():
        seen = []
        for method in ("predict", "features"):
            run = getattr(EagerDenoiser, method)

            def spy(self, latents, *rest, run=run, method=method, seen=seen):
                seen.append((method, len(latents), latents.requires_grad))
                return run(self, latents, *rest)

            monkeypatch.setattr(EagerDenoiser, method, spy)
        call()
        monkeypatch.undo()
        kind = ("predict", 2) if name in "PR" else ("features", 1)
        assert seen == [(*kind, name in "RT")], name


def test_a_share_is_of_sums_of_medians():
    seconds = {
        "P": np.array([1.0, 9.0, 1.0]),
        "R": np.array([4.0, 4.0, 4.0]),
        "T": np.array([1.0, 2.0, 3.0]),
    }
    share = moft_cost.time_share(seconds, {"P": 2, "T": 3}, {"P": 4, "R": 1})
    assert share.value == (2 * 1 + 3 * 2) / (4 * 1 + 4)
    assert share.n == 3 and share.low < share.value < share.high
    alone = {name: each[:1] for name, each in seconds.items()}
    one = moft_cost.time_share(alone, {"T": 1}, {"R": 1})
    assert (one.low, one.value, one.high, one.n) == (0.25, 0.25, 0.25, 1)


def test_calls_are_timed_in_turn():
    calls = []
    ways = {name: functools.partial(calls.append, name) for name in "ab"}
    seconds = moft_cost.time_in_turn(
        ways, repeats=3, warmup=1, device="cpu", progress=Progress(), label=""
    )
    assert calls == ["a", "b"] * 4
    assert {name: each.shape for name, each in seconds.items()} == {"a": (3,), "b": (3,)}


def test_the_figures_are_of_the_parts_that_they_name(case, monkeypatch):
    """With times that are made up: P 1, R 4, K 0.5, T 2, and all steps as the sums say."""
    took = {"P": 1.0, "R": 4.0, "K": 0.5, "T": 2.0, "released": 28.0, "shared": 15.5, "own": 14.0}
    monkeypatch.setattr(
        moft_cost,
        "time_in_turn",
        lambda calls, **_: {name: np.array([took[name]]) for name in calls},
    )
    monkeypatch.setattr(moft_cost, "require_agreement", lambda *_: 1e-6)
    monkeypatch.setattr(moft_cost, "embedded_case", lambda *_: case)
    monkeypatch.setattr(moft_cost, "large_case", lambda *_: case)
    peaks = {"_run_gradient": 3, "_run_whole_gradient": 6, "_run_both_halves": 12}

    def peak(prepare, run, *, device):
        assert prepare() is case and device == "cpu"
        return PeakMemory(100, 100 + peaks[run.__name__])

    monkeypatch.setattr(moft_cost, "peak_memory", peak)
    figures = moft_cost.measure(BenchOptions(quick=True), Progress())
    value = {name: figure.value for name, figure in figures.items()}
    # 6 steps, 2 of them guided by 2 gradients each.
    assert value["moft_cost.time"] == (7 + 0.5 + 8) / (12 + 16)
    assert value["moft_cost.time_unshared"] == (6 + 8) / (12 + 16)
    assert value["moft_cost.embedded.time"] == value["moft_cost.embedded.time_from_parts"]
    assert value["moft_cost.embedded.time_unshared"] == 0.5
    assert value["moft_cost.arithmetic_error"] == 0.0
    assert (value["moft_cost.memory"], value["moft_cost.memory_released"]) == (0.5, 0.25)
    assert value["moft_cost.gradient_error"] == 1e-6
    took["own"] = 17.5
    figures = moft_cost.measure(BenchOptions(quick=True), Progress())
    assert figures["moft_cost.arithmetic_error"].value == pytest.approx(0.2)


def test_the_full_size_case_agrees_in_float32_and_in_its_type(monkeypatch):
    case, exact = moft_cost.large_pair("cpu", 8, 16, TINY)  # fewer features hardly move
    assert (case.loop.dtype, exact.loop.dtype) == (torch.bfloat16, torch.float32)
    weights = case.loop.denoiser.network.state_dict()
    for name, tensor in exact.loop.denoiser.network.state_dict().items():
        assert torch.equal(tensor, weights[name].float()), name
    assert moft_cost.require_agreement(case, exact) <= moft_cost.CLOSE
    for run in (moft_cost._run_gradient, moft_cost._run_whole_gradient, moft_cost._run_both_halves):
        run(case)
    ours = moft_cost.our_gradient
    for wrong, type_of_it, words in (
        (1.001, torch.float32, "same gradient to 0.0001"),
        (4.0, torch.bfloat16, "in torch.bfloat16 ours must err at most"),
    ):
        scale = lambda case, keys, w=wrong, t=type_of_it: (
            ours(case, keys) * (w if case.loop.dtype is t else 1)
        )
        monkeypatch.setattr(moft_cost, "our_gradient", scale)
        with pytest.raises(WorkError, match=words):
            moft_cost.require_agreement(case, exact)


def test_gradients_are_compared_in_exact_float32(case, monkeypatch):
    """Convolutions in TF32 would err by more than the bound, in one of the ways alone."""
    allowed = []
    released = moft_cost.released_gradient
    spy = lambda *given: (allowed.append(torch.backends.cudnn.allow_tf32), released(*given))[1]
    monkeypatch.setattr(moft_cost, "released_gradient", spy)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        moft_cost.require_agreement(case)
    assert allowed == [False, False]
