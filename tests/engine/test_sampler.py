"""The tables against diffusers' schedulers, run side by side, and against what theory says."""

import itertools
import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kinetiq.errors import CheckpointError, MissingDependencyError, RequestError
from kinetiq.sampler import (
    SAMPLERS,
    SamplerTable,
    build_sampler_table,
    resolve_sampler,
    step_coefficients,
)

# The schedulers that are run here for comparison copy tensors into numpy 2 by numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DDIM, DDPM, EULER, DPM, LCM = SAMPLERS.values()
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SDE = {"algorithm_type": "sde-dpmsolver++"}

# The schedulers work in float32. Its rounding is 6e-8 a step; differences of neighbouring levels,
# which the coefficients are made of, lose one to two digits more.
BOUND = 1e-5

VARIANTS: list[tuple[str, dict[str, Any], float]] = [
    *((DDIM, {"timestep_spacing": each}, eta) for each in SPACINGS for eta in (0.0, 0.4, 1.0)),
    (DDIM, {"steps_offset": 1, "set_alpha_to_one": False}, 0.0),
    (DDIM, {"steps_offset": 1, "set_alpha_to_one": False}, 0.7),
    (DDIM, {"beta_schedule": "squaredcos_cap_v2"}, 0.0),
    (DDIM, {"num_train_timesteps": 77, "beta_schedule": "linear", "beta_end": 0.2}, 0.5),
    *((DDPM, {"timestep_spacing": each}, 0.0) for each in SPACINGS),
    *((DDPM, {"variance_type": each}, 0.0) for each in ("fixed_small_log", "fixed_large")),
    (DDPM, {"steps_offset": 1}, 0.0),
    *((EULER, {"timestep_spacing": each}, 0.0) for each in SPACINGS),
    (EULER, {"use_karras_sigmas": True}, 0.0),
    (EULER, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}, 0.0),
    (EULER, {"use_exponential_sigmas": True}, 0.0),
    (EULER, {"interpolation_type": "log_linear"}, 0.0),
    (EULER, {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}, 0.0),
    (EULER, {"timestep_type": "continuous"}, 0.0),
    *((DPM, {"timestep_spacing": each}, 0.0) for each in SPACINGS),
    *(
        (DPM, {"solver_order": order, "solver_type": kind, **algorithm}, 0.0)
        for order, kind, algorithm in itertools.product((1, 2), ("midpoint", "heun"), ({}, SDE))
    ),
    (DPM, {"lower_order_final": False, "final_sigmas_type": "sigma_min"}, 0.0),
    (DPM, {"final_sigmas_type": "sigma_min"}, 0.0),
    (DPM, {"final_sigmas_type": "sigma_min", "euler_at_final": True, **SDE}, 0.0),
    (DPM, {"final_sigmas_type": "sigma_min", "solver_type": "heun", **SDE}, 0.0),
    (DPM, {"use_karras_sigmas": True}, 0.0),
    (DPM, {"use_karras_sigmas": True, **SDE}, 0.0),
    (DPM, {"use_exponential_sigmas": True}, 0.0),
    (DPM, {"use_lu_lambdas": True}, 0.0),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, 0.0),
    (LCM, {}, 0.0),
    (LCM, {"timestep_scaling": 1.0, "original_inference_steps": 25}, 0.0),
]
ZERO_VARIANTS: list[tuple[str, dict[str, Any], float]] = [
    (DDIM, ZERO, 0.0),
    (DDIM, ZERO, 0.9),  # at 1 diffusers takes the root of a rounding error: NaN
    (DDPM, ZERO, 0.0),
    (EULER, ZERO, 0.0),
    (DPM, ZERO, 0.0),
    (DPM, ZERO | SDE, 0.0),
    (LCM, ZERO, 0.0),
]
CASES = [
    *((*variant, kind) for variant in VARIANTS for kind in PREDICTIONS),
    *((*variant, kind) for variant in ZERO_VARIANTS for kind in PREDICTIONS[1:]),
]


def case_name(case: Any) -> str:
    scheduler, options, eta, kind = case
    return "-".join([scheduler[:5], kind, str(eta), *(f"{k}={v}" for k, v in options.items())])


def configure(scheduler: str, options: dict[str, Any], kind: str = "epsilon") -> dict[str, Any]:
    clip = {"clip_sample": False} if scheduler in (DDIM, DDPM) else {}
    return STABLE | clip | options | {"prediction_type": kind}


def network(x: Tensor, timestep: float) -> Tensor:
    """Nonlinear, so that an error in x or in the timestep shows in the output."""
    return torch.sin(x) + 1e-4 * timestep


def run_diffusers(
    scheduler: Any, start: Tensor, generator: torch.Generator, eta: float
) -> tuple[list[Tensor], list[bool]]:
    """All samples from the first to the last, and at which steps the generator was used."""
    options = {"eta": eta} if isinstance(scheduler, diffusers.DDIMScheduler) else {}
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else a repeated first timestep starts at its second place
    samples, drawn = [start * scheduler.init_noise_sigma], []
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(samples[-1], timestep)
        before = generator.get_state()
        output = network(seen, float(timestep))
        stepped = scheduler.step(output, timestep, samples[-1], generator=generator, **options)
        samples.append(stepped.prev_sample)
        drawn.append(not torch.equal(before, generator.get_state()))
    return samples, drawn


def run_table(
    table: SamplerTable,
    start: Tensor,
    generator: torch.Generator,
    guide: list[Tensor] | None = None,
) -> list[Tensor]:
    """All samples; with a guide, every step starts from the guide's sample instead of its own."""
    samples, former = [start * table.initial_scale], torch.zeros_like(start)
    for index in range(table.steps):
        row, x = table.row(index), samples[-1] if guide is None else guide[index]
        output = network(row.input_scale * x, row.timestep)
        clean = row.clean_from_sample * x + row.clean_from_output * output
        fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype) if row.draws_noise else 0
        samples.append(
            row.next_from_sample * x
            + row.next_from_clean * clean
            + row.next_from_former * former
            + row.noise * fresh
        )
        former = clean
    return samples


def assert_samples_close(got: list[Tensor], expected: list[Tensor], bound: float) -> None:
    largest = expected[0].abs().max()
    for step, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        before, largest = largest, theirs.abs().max()
        error = (mine.double() - theirs.double()).abs().max() / max(before, largest)
        assert error <= bound, f"sample {step} of {len(got)}: {error:.3g} exceeds {bound:.3g}"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_follows_the_scheduler(case: Any) -> None:
    name, options, eta, kind = case
    config = configure(name, options, kind)
    start = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for steps in (1, 2, 7, 14, 15):
        if "lambda_min_clipped" in options and steps == 1:
            continue  # a single step of the clipped schedule has no level to go to
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(steps)
        table = build_sampler_table(name, config, steps, eta=eta)
        expected, drawn = run_diffusers(scheduler, start, torch.Generator().manual_seed(5), eta)
        assert table.steps == steps and table.draws_noise.tolist() == drawn
        assert table.timestep.tolist() == scheduler.timesteps.tolist()
        assert not table.noise[~table.draws_noise].any()
        stepped = run_table(table, start, torch.Generator().manual_seed(5), guide=expected)
        assert_samples_close(stepped, expected, BOUND)
        if name == EULER and options == ZERO:
            continue  # from a level of 4096 the first step leaves float32 an error of 2e-4
        sampled = run_table(table, start, torch.Generator().manual_seed(5))
        assert_samples_close(sampled, expected, BOUND)


@pytest.mark.parametrize(
    "case", [each for each in CASES if each[0] in (DDIM, DDPM, LCM)], ids=case_name
)
def test_is_exact_where_the_scheduler_can_run_in_float64(case: Any) -> None:
    name, options, eta, kind = case
    config = configure(name, options, kind)
    start = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for steps in (1, 7, 20):
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(steps)
        for each in ("alphas_cumprod", "final_alpha_cumprod", "one"):
            if hasattr(scheduler, each):
                setattr(scheduler, each, getattr(scheduler, each).double())
        if name == LCM:  # it takes the boundary scalings of an integer tensor, in float32
            scheduler.timesteps = scheduler.timesteps.to(torch.int64)
            plain = scheduler.get_scalings_for_boundary_condition_discrete
            scheduler.get_scalings_for_boundary_condition_discrete = lambda t, plain=plain: plain(
                int(t)
            )
        table = build_sampler_table(name, config, steps, eta=eta)
        expected, _ = run_diffusers(scheduler, start, torch.Generator().manual_seed(5), eta)
        got = run_table(table, start, torch.Generator().manual_seed(5))
        assert_samples_close(got, expected, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_noises_a_source_like_the_scheduler(case: Any) -> None:
    name, options, eta, kind = case
    config = configure(name, options, kind)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 1, 4, 4, generator=generator)
    table = build_sampler_table(name, config, 9, eta=eta)
    for index in range(9):
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(9)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(index)
        timestep = scheduler.timesteps[index]
        noised = scheduler.add_noise(clean, noise, timestep[None])
        expected = scheduler.scale_model_input(noised, timestep)
        row = table.row(index)
        got = row.source_signal * clean + row.source_noise * noise
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_rows_of_one_batch_are_at_their_own_step_of_their_own_sampler() -> None:
    tables = [
        build_sampler_table(DDIM, configure(DDIM, {}), 6, eta=1.0),
        build_sampler_table(EULER, configure(EULER, {}, "v_prediction"), 3),
        build_sampler_table(DPM, configure(DPM, {}), 9),
        build_sampler_table(LCM, configure(LCM, {}), 4),
    ]
    indices = [5, 0, 4, 1]
    step = step_coefficients(tables, indices)
    assert all(each.dtype == torch.float32 and each.shape == (4,) for each in step)
    x, output, former, fresh = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    clean = step.clean_from_sample * x + step.clean_from_output * output
    following = step.sample * x + step.output * output + step.former * former + step.noise * fresh
    for place, (table, index) in enumerate(zip(tables, indices, strict=True)):
        row = table.row(index)
        mine = row.clean_from_sample * x[place] + row.clean_from_output * output[place]
        expected = row.next_from_sample * x[place] + row.next_from_clean * mine
        expected += row.next_from_former * former[place] + row.noise * fresh[place]
        torch.testing.assert_close(clean[place], mine, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(following[place], expected, rtol=1e-5, atol=1e-5)
        assert step.timestep[place] == np.float32(row.timestep)
        assert step.input_scale[place] == np.float32(row.input_scale)
    assert step_coefficients([], []).noise.shape == (0,)


betas = st.tuples(st.floats(1e-4, 2e-3), st.floats(5e-3, 3e-2)).map(
    lambda ends: {"beta_schedule": "linear", "beta_start": ends[0], "beta_end": ends[1]}
)
keeping_the_marginals = st.one_of(
    st.tuples(st.just(DDIM), st.just({}), st.floats(0.0, 1.0)),
    st.tuples(st.just(DDPM), st.sampled_from([{"timestep_spacing": s} for s in SPACINGS]), st.just(0.0)),
    st.tuples(st.just(EULER), st.sampled_from([{}, {"use_karras_sigmas": True}]), st.just(0.0)),
    st.tuples(
        st.just(DPM),
        st.sampled_from([
            {"solver_order": order, "solver_type": kind, **algorithm}
            for order in (1, 2) for kind in ("midpoint", "heun") for algorithm in ({}, SDE)
        ]),
        st.just(0.0),
    ),
    st.tuples(st.just(LCM), st.just({"timestep_scaling": 1e9}), st.just(0.0)),
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(keeping_the_marginals, betas, st.integers(1, 50))
def test_known_clean_latents_are_carried_to_the_level_of_the_next_step(
    sampler: Any, schedule: dict[str, Any], steps: int
) -> None:
    """If every estimate is the true z, then x_i ~ N(a z, b²) must give x_{i+1} ~ N(a' z, b'²)."""
    name, options, eta = sampler
    table = build_sampler_table(name, configure(name, schedule | options, "sample"), steps, eta=eta)
    signal = np.append(table.source_signal / table.input_scale, 1.0)
    spread = np.append(table.source_noise / table.input_scale, 0.0)
    mean = table.next_from_sample * signal[:-1] + table.next_from_clean + table.next_from_former
    variance = (table.next_from_sample * spread[:-1]) ** 2 + table.noise**2
    np.testing.assert_allclose(mean, signal[1:], rtol=1e-9)
    np.testing.assert_allclose(variance, spread[1:] ** 2, rtol=1e-9, atol=1e-18)
    assert table.next_from_former[0] == 0.0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from([DDIM, DDPM, DPM]), betas, st.integers(2, 40))
def test_stochastic_samplers_draw_from_the_exact_posterior(
    name: str, schedule: dict[str, Any], steps: int
) -> None:
    """x' given x and z, by conditioning the joint Gaussian of x' and x = r x' + fresh noise."""
    options = {"solver_order": 1, **SDE} if name == DPM else {}
    config = configure(name, schedule | options)
    table = build_sampler_table(name, config, steps, eta=1.0 if name == DDIM else 0.0)
    signal, spread = table.source_signal, table.source_noise
    ratio = signal[:-1] / signal[1:]
    gain = ratio * spread[1:] ** 2 / spread[:-1] ** 2  # covariance over the variance of x
    variance = spread[1:] ** 2 * (1 - ratio * gain)
    np.testing.assert_allclose(table.next_from_sample[:-1], gain, rtol=1e-9)
    np.testing.assert_allclose(
        table.next_from_clean[:-1], signal[1:] - gain * signal[:-1], rtol=1e-8
    )
    np.testing.assert_allclose(table.noise[:-1] ** 2, variance, rtol=1e-8)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(betas, st.integers(1, 50), st.sampled_from(PREDICTIONS), st.floats(0.0, 1.0))
def test_the_last_step_returns_the_clean_estimate(
    schedule: dict[str, Any], steps: int, kind: str, eta: float
) -> None:
    for name in SAMPLERS.values():
        share = eta if name == DDIM else 0.0
        table = build_sampler_table(name, configure(name, schedule, kind), steps, eta=share)
        last = table.row(steps - 1)
        assert (last.next_from_sample, last.next_from_clean, last.next_from_former) == (
            0.0,
            1.0,
            0.0,
        )
        assert last.noise <= 1e-10  # DDPM keeps a variance of 1e-20


def test_the_estimate_undoes_the_noise() -> None:
    clean, noise = torch.randn(
        2, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for name, kind in itertools.product((DDIM, DDPM, EULER, DPM), PREDICTIONS):
        table = build_sampler_table(name, configure(name, {}, kind), 10)
        a, b = (
            torch.from_numpy(table.source_signal.copy()),
            torch.from_numpy(table.source_noise.copy()),
        )
        output = {"epsilon": noise, "v_prediction": a * noise - b * clean, "sample": clean}[kind]
        x = (a * clean + b * noise) / torch.from_numpy(table.input_scale.copy())
        got = torch.from_numpy(table.clean_from_sample.copy()) * x
        got += torch.from_numpy(table.clean_from_output.copy()) * output
        torch.testing.assert_close(got, clean, rtol=1e-12, atol=1e-12)


def test_ddim_by_hand() -> None:
    """Two training steps with betas 0.36 and 0.75: shares of the signal² 0.64 and 0.16."""
    config = {"num_train_timesteps": 2, "trained_betas": [0.36, 0.75], "clip_sample": False}
    table = build_sampler_table("ddim", config, 2)
    a, b = np.sqrt(0.16), np.sqrt(0.84)
    assert table.timestep.tolist() == [1, 0]
    np.testing.assert_allclose(table.source_signal, [a, 0.8], rtol=1e-6)
    np.testing.assert_allclose(table.next_from_sample, [0.6 / b, 0.0], rtol=1e-6)
    np.testing.assert_allclose(table.next_from_clean, [0.8 - a * 0.6 / b, 1.0], rtol=1e-6)
    np.testing.assert_allclose(table.clean_from_output, [-b / a, -0.75], rtol=1e-6)


def test_eta_1_forgets_a_sample_of_pure_noise() -> None:
    config = configure(DDIM, ZERO, "v_prediction")
    first = build_sampler_table(DDIM, config, 20, eta=1.0).row(0)
    assert (first.source_signal, first.source_noise, first.next_from_sample) == (0.0, 1.0, 0.0)
    np.testing.assert_allclose(first.next_from_clean**2 + first.noise**2, 1.0, rtol=1e-12)


def test_columns_cannot_be_written() -> None:
    table = build_sampler_table(DDIM, configure(DDIM, {}), 4)
    with pytest.raises(ValueError, match="read-only"):
        table.noise[0] = 1.0


@pytest.mark.parametrize("origin", ["PNDMScheduler", "UniPCMultistepScheduler", EULER, LCM, DPM])
def test_another_scheduler_reads_the_noise_schedule_as_diffusers_does(origin: str) -> None:
    """Through `from_config`, except that a class that never clipped does not begin to."""
    source = getattr(diffusers, origin)(**STABLE, steps_offset=1)
    config = json.loads(source.to_json_string())
    for name in SAMPLERS.values():
        clip = {"clip_sample": False} if name in (DDIM, DDPM) else {}
        solver = {"solver_type": "midpoint"} if name == DPM else {}
        variance = {"variance_type": "fixed_small"} if name == DDPM else {}
        expected = getattr(diffusers, name).from_config(config, **clip, **solver, **variance)
        expected.set_timesteps(6)
        table = build_sampler_table(name, config, 6)
        assert table.timestep.tolist() == expected.timesteps.tolist()
        if hasattr(expected, "sigmas"):
            signal = 1 / np.sqrt(expected.sigmas[:6].double().numpy() ** 2 + 1)
        else:
            signal = np.sqrt(expected.alphas_cumprod[expected.timesteps].double().numpy())
        np.testing.assert_array_equal(table.source_signal, signal)


def test_a_partial_configuration_has_the_defaults_of_its_own_class() -> None:
    theirs = build_sampler_table("lcm", {"_class_name": LCM}, 1).source_signal[0]
    share = diffusers.LCMScheduler().alphas_cumprod[999].item()
    assert theirs == np.sqrt(share)
    ours = build_sampler_table("ddim", {"_class_name": LCM, "timestep_spacing": "trailing"}, 1)
    assert ours.source_signal[0] == theirs


def test_keys_of_former_schedulers_are_left_alone() -> None:
    config = configure(
        EULER, {"skip_prk_steps": True, "clip_sample": True, "_diffusers_version": "0"}
    )
    assert build_sampler_table("euler", config, 3).steps == 3


@pytest.mark.parametrize(
    ("name", "config", "error", "words"),
    [
        (DDIM, {}, CheckpointError, r'clip_sample of DDIMScheduler must be False, got True, the default of diffusers; .*write "clip_sample": false into scheduler_config.json'),
        (DDIM, {"clip_sample": True}, CheckpointError, r"got True; clipped"),
        (DDIM, {"_class_name": DDPM}, CheckpointError, r"clip_sample of DDIMScheduler must be False"),
        (DDPM, {"clip_sample": False, "thresholding": True}, CheckpointError, r"thresholding of DDPMScheduler must be False, got True"),
        (DDPM, {"clip_sample": False, "variance_type": "learned_range"}, CheckpointError, r"variance_type must be fixed, got 'learned_range'"),
        (DDPM, {"clip_sample": False, "variance_type": "fixed_large_log"}, CheckpointError, r"must be 'fixed_small' or 'fixed_small_log' or 'fixed_large', got 'fixed_large_log'"),
        (DPM, {"variance_type": "learned"}, CheckpointError, r"a network that predicts its variance is not supported"),
        (DPM, {"solver_order": 3}, CheckpointError, r"solver_order of DPMSolverMultistepScheduler must be 1 or 2, got 3"),
        (DPM, {"algorithm_type": "dpmsolver"}, CheckpointError, r"algorithm_type of .* must be 'dpmsolver\+\+' or 'sde-dpmsolver\+\+', got 'dpmsolver'"),
        (DPM, {"solver_type": "bh2"}, CheckpointError, r"must be 'midpoint' or 'heun', got 'bh2'"),
        (DPM, {"use_flow_sigmas": True}, CheckpointError, r"use_flow_sigmas must be False, got True"),
        (EULER, {"prediction_type": "flow_prediction"}, CheckpointError, r"must be 'epsilon' or 'v_prediction' or 'sample', got 'flow_prediction'"),
        (EULER, {"num_train_timesteps": 0}, CheckpointError, r"num_train_timesteps of .* must be a whole number above 0, got 0"),
        (EULER, {"use_karras_sigmas": True, "sigma_min": -1.0}, CheckpointError, r"sigma_min of EulerDiscreteScheduler must be a number above 0, got -1.0"),
        (LCM, {"timestep_scaling": "10"}, CheckpointError, r"timestep_scaling of LCMScheduler must be a number above 0, got '10'"),
        (LCM, {"original_inference_steps": None}, CheckpointError, r"original_inference_steps of LCMScheduler must be a whole number above 0, got None"),
        (EULER, {"beta_schedule": "cubic"}, CheckpointError, r"must be one that diffusers accepts, got NotImplementedError: cubic"),
        (EULER, {"beta_start": "low"}, CheckpointError, r"must be one that diffusers accepts, got TypeError"),
        (EULER, {"timestep_spacing": "even"}, CheckpointError, r"got ValueError: even is not supported"),
        (EULER, {"beta_end": 3.0}, CheckpointError, r"must be num_train_timesteps = 1000 numbers above 0 and at most 1, got 1000 from 0.0001 to 3; check"),
        (EULER, {"trained_betas": [0.1, 0.2]}, CheckpointError, r"must be num_train_timesteps = 1000 numbers above 0 and at most 1, got 2 from 0.1 to 0.2"),
        (EULER, {"beta_start": 0.0}, CheckpointError, r"got 1000 from 0 to 0.02; check beta_start"),
        (EULER, {"trained_betas": []}, CheckpointError, r"got 0 from inf to -inf; check"),
        (EULER, {"beta_start": 1e-9}, CheckpointError, r"must give finite coefficients, got next_from_sample = nan at step 4; check the betas"),
        (DDIM, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, CheckpointError, r"must have a noise schedule of betas for DDIMScheduler to use, got FlowMatchEuler\w+, which has none"),
        (DDIM, ZERO | {"clip_sample": False}, CheckpointError, r"must be 'v_prediction' or 'sample' where the signal-to-noise ratio is zero, got 'epsilon' at timestep 999; set rescale_betas_zero_snr to false"),
        ("PNDMScheduler", {}, CheckpointError, r'must be one of DDIMScheduler, .*, got PNDMScheduler; pass sampler="ddim"'),
        ("heun", {}, RequestError, r"^sampler: must be one of ddim, ddpm, euler, dpm\+\+2m, lcm, got 'heun'$"),
    ],
)  # fmt: skip
def test_says_what_is_wrong_with_a_configuration(
    name: str, config: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        build_sampler_table(name, config, 5)


@pytest.mark.parametrize(
    ("name", "options", "steps", "eta", "words"),
    [
        (DDIM, {}, 0, 0.0, r"steps of DDIMScheduler must be a whole number, 1 to 1000 \(num_train_timesteps of the checkpoint\), got 0"),
        (DDIM, {}, 1001, 0.0, r"got 1001$"),
        (DDIM, {}, 2.5, 0.0, r"got 2.5$"),
        (DDIM, {}, True, 0.0, r"got True$"),
        (LCM, {}, 51, 0.0, r"1 to 50 \(original_inference_steps of the checkpoint\), got 51"),
        (DDIM, {}, 5, 1.1, r"eta must be a number, 0 to 1, got 1.1"),
        (DDIM, {}, 5, float("nan"), r"eta must be a number, 0 to 1, got nan"),
        (DDIM, {}, 5, "1", r"eta must be a number, 0 to 1, got '1'"),
        (EULER, {}, 5, 0.5, r'eta belongs to DDIM alone, got eta=0.5 with EulerDiscreteScheduler; pass sampler="ddim"'),
        (DDIM, {"steps_offset": 1}, 1000, 0.0, r"must be 1000 timesteps in 0..999, got 1000 from 1000 to 1 with timestep_spacing 'leading' and steps_offset 1; choose"),
        (DDIM, {"timestep_spacing": "trailing"}, 61, 0.0, r"must be 61 timesteps in 0..999, got 62 from 999 to -1"),
        (DPM, {"timestep_spacing": "trailing", "lambda_min_clipped": -1.0}, 20, 0.0, r"must be 20 timesteps in 0..999, got \d\d from"),
        (DPM, {}, 1000, 0.0, r"must fall in noise from one to the next, got the same level at steps 499 and 500; use fewer steps"),
    ],
)  # fmt: skip
def test_says_what_is_wrong_with_a_request(
    name: str, options: dict[str, Any], steps: Any, eta: Any, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        build_sampler_table(name, configure(name, options), steps, eta=eta)


def test_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "diffusers.schedulers.scheduling_euler_discrete.is_scipy_available"
    monkeypatch.setattr(module, lambda: False)
    with pytest.raises(
        MissingDependencyError, match=r"EulerDiscreteScheduler as configured: .*scipy"
    ):
        build_sampler_table(EULER, {"use_beta_sigmas": True}, 5)


def test_says_that_there_is_no_such_step() -> None:
    table = build_sampler_table(DDIM, configure(DDIM, {}), 4)
    for index in (-1, 4):
        with pytest.raises(
            RequestError, match=rf"a step of this table must be in 0..3, got {index}"
        ):
            table.row(index)
    with pytest.raises(RequestError, match="one a row, got 1 tables and 2 indices"):
        step_coefficients([table], [0, 1])


def test_names_of_samplers() -> None:
    assert [resolve_sampler(name) for name in SAMPLERS] == list(SAMPLERS.values())
    assert resolve_sampler(EULER) == EULER
