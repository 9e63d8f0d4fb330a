"""Diffusion samplers as tables of coefficients, so that each row of a batch is at its own step.

One step of every supported sampler is linear in the sample x, the network's output m, the clean
estimate of the step before, and fresh noise ε of unit variance:

    c_i     = clean_from_sample_i · x_i + clean_from_output_i · m_i
    x_{i+1} = next_from_sample_i · x_i + next_from_clean_i · c_i
            + next_from_former_i · c_{i-1} + noise_i · ε

where m_i is the network's output, after guidance, for the input input_scale_i · x_i at timestep_i.
The noise schedule and the timesteps are read from the diffusers scheduler of the checkpoint; the
coefficients are computed from them in float64, by the formula of each sampler's paper, and agree
with what that scheduler does, its choices at the first and last steps included.

Symbols below: at a step, a is the share of the clean latents z and b the share of the noise in
the network's input, a² + b² = 1; a prime marks the step after. a² is diffusers' `alphas_cumprod`,
and s = b / a is the noise level in Karras' units, diffusers' `sigmas`.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinetiq.errors import CheckpointError, InputError, MissingDependencyError, RequestError

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# Which solver runs is what choosing another sampler decides, so these are not carried over to it.
_SOLVER_SETTINGS = ("algorithm_type", "solver_type", "solver_order", "variance_type")

Column = NDArray[np.float64]
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SamplerRow:
    """The coefficients of one step; the fields mean what they mean in `SamplerTable`."""

    timestep: float
    input_scale: float
    source_signal: float
    source_noise: float
    clean_from_sample: float
    clean_from_output: float
    next_from_sample: float
    next_from_clean: float
    next_from_former: float
    noise: float
    draws_noise: bool


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The coefficients of all steps of one sampler; columns are read-only, float64, `[steps]`.

    Attributes:
        name: Class name of the diffusers scheduler that this table reproduces.
        eta: DDIM's share of fresh noise, 0 to 1; 0 for other samplers.
        initial_scale: Standard deviation of the sample at the start: x_0 = initial_scale · noise.
        timestep: What the network is told; fractional for some noise schedules.
        input_scale: The network sees input_scale · x.
        source_signal: a: the network's input for clean latents z noised to this step is
            source_signal · z + source_noise · noise, `input_scale` included.
        source_noise: b, see `source_signal`.
        clean_from_sample: Weight of x_i in the clean estimate c_i.
        clean_from_output: Weight of the network's output m_i in c_i.
        next_from_sample: Weight of x_i in x_{i+1}.
        next_from_clean: Weight of c_i in x_{i+1}.
        next_from_former: Weight of c_{i-1} in x_{i+1}; 0 at the first step.
        noise: Standard deviation of the fresh noise in x_{i+1}.
        draws_noise: `[steps]` of bool: the scheduler draws from the generator at this step, also
            where `noise` is 0, so the same generator gives the same noise afterwards.
    """

    name: str
    eta: float
    initial_scale: float
    timestep: Column
    input_scale: Column
    source_signal: Column
    source_noise: Column
    clean_from_sample: Column
    clean_from_output: Column
    next_from_sample: Column
    next_from_clean: Column
    next_from_former: Column
    noise: Column
    draws_noise: NDArray[np.bool_]

    def __post_init__(self) -> None:
        for field in fields(SamplerRow):
            kind = np.bool_ if field.name == "draws_noise" else np.float64
            column: NDArray[Any] = np.array(getattr(self, field.name), dtype=kind)
            column.setflags(write=False)
            object.__setattr__(self, field.name, column)

    @property
    def steps(self) -> int:
        """Number of steps, which is the number of times that the network runs."""
        return len(self.timestep)

    def row(self, index: int) -> SamplerRow:
        """The coefficients of step `index`.

        Raises:
            RequestError: If there is no such step.
        """
        if not 0 <= index < self.steps:
            raise RequestError(
                f"sampler: a step of this table must be in 0..{self.steps - 1}, got {index}"
            )
        return SamplerRow(
            **{field.name: getattr(self, field.name)[index].item() for field in fields(SamplerRow)}
        )


class StepCoefficients(NamedTuple):
    """One step of a batch, float32, each `[rows]`; the clean estimate is folded into the update.

    x_next = sample · x + output · m + former · c_former + noise · ε
    c      = clean_from_sample · x + clean_from_output · m

    `former` is 0 at a row's first step, where `c_former` may be anything finite.
    """

    timestep: Tensor
    input_scale: Tensor
    sample: Tensor
    output: Tensor
    former: Tensor
    noise: Tensor
    clean_from_sample: Tensor
    clean_from_output: Tensor


def step_coefficients(tables: Sequence[SamplerTable], indices: Sequence[int]) -> StepCoefficients:
    """Gather the coefficients of a batch whose row r is at step `indices[r]` of `tables[r]`.

    Raises:
        RequestError: If the lengths differ, or a table has no such step.
    """
    if len(tables) != len(indices):
        raise RequestError(
            "sampler: tables and indices must be one a row, "
            f"got {len(tables)} tables and {len(indices)} indices"
        )
    rows = [table.row(index) for table, index in zip(tables, indices, strict=True)]

    def gather(weight: Callable[[SamplerRow], float]) -> Tensor:
        return torch.tensor([weight(row) for row in rows], dtype=torch.float32)

    return StepCoefficients(
        timestep=gather(lambda row: row.timestep),
        input_scale=gather(lambda row: row.input_scale),
        sample=gather(
            lambda row: row.next_from_sample + row.next_from_clean * row.clean_from_sample
        ),
        output=gather(lambda row: row.next_from_clean * row.clean_from_output),
        former=gather(lambda row: row.next_from_former),
        noise=gather(lambda row: row.noise),
        clean_from_sample=gather(lambda row: row.clean_from_sample),
        clean_from_output=gather(lambda row: row.clean_from_output),
    )


def resolve_sampler(name: str) -> str:
    """The diffusers class name for a short name of `SAMPLERS`, or for itself.

    Raises:
        RequestError: If a short name is unknown.
        CheckpointError: If a scheduler class, as named by a checkpoint, is not supported.
    """
    for short, scheduler in SAMPLERS.items():
        if name in (short, scheduler):
            return scheduler
    if str(name).endswith("Scheduler"):
        raise CheckpointError(
            f"sampler: the checkpoint's scheduler must be one of {', '.join(SAMPLERS.values())}, "
            f'got {name}; pass sampler="ddim" to use its noise schedule with a supported sampler'
        )
    raise RequestError(f"sampler: must be one of {', '.join(SAMPLERS)}, got {name!r}")


def build_sampler_table(
    scheduler: str, config: Mapping[str, Any], steps: int, *, eta: float = 0.0
) -> SamplerTable:
    """Compute the table of a diffusers scheduler for `steps` steps.

    Args:
        scheduler: Class name or short name, see `resolve_sampler`.
        config: What `scheduler_config.json` says. Where its `_class_name` is another class, it is
            read as diffusers' `from_config` reads it: the noise schedule, the spacing of the
            timesteps and the prediction type are kept, with the defaults of that other class
            where they are left out; the solver is the default of `scheduler`; clipping is off
            unless the configuration or that class turns it on. Keys that `scheduler` does not
            have are left alone, since checkpoints carry those of former schedulers.
        steps: Number of steps, 1 to `num_train_timesteps` (LCM: `original_inference_steps`).
        eta: DDIM's share of fresh noise, 0 to 1; other samplers have none.

    Raises:
        RequestError: If `scheduler`, `steps` or `eta` cannot be used, alone or together.
        CheckpointError: If the scheduler is not supported, if a step of it is not linear, or if
            diffusers refuses the configuration.
        MissingDependencyError: If the configuration needs a package that is not installed.
    """
    name = resolve_sampler(scheduler)
    settings = _settings(name, config)
    _check_request(name, settings, steps, eta)
    with np.errstate(divide="ignore", invalid="ignore"):  # `_check_finite` says it in words
        built = _build(name, settings, steps)
        columns = _COLUMNS[name](built, float(eta))
    _check_finite(name, columns)
    return SamplerTable(
        name=name, eta=float(eta), initial_scale=float(built.init_noise_sigma), **columns
    )


def _settings(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of scheduler `name`, checked: defaults overlaid by the configuration."""
    import diffusers

    settings = _defaults(getattr(diffusers, name))
    origin_name = str(config.get("_class_name", name))
    if origin_name == name:
        settings |= {key: value for key, value in config.items() if key in settings}
    else:
        origin = _origin_defaults(origin_name)
        if origin and "beta_start" not in origin:
            raise CheckpointError(
                "sampler: the checkpoint's scheduler must have a noise schedule of betas for "
                f"{name} to use, got {origin_name}, which has none"
            )
        if origin and "clip_sample" in settings:
            settings["clip_sample"] = False
        kept = settings.keys() - set(_SOLVER_SETTINGS)
        settings |= {key: value for key, value in (origin | dict(config)).items() if key in kept}
    _check_linear(name, settings, config)
    _check_numbers(name, settings)
    return settings


def _origin_defaults(origin_name: str) -> dict[str, Any]:
    """Defaults of the scheduler that a configuration was written for; none if not diffusers'."""
    import diffusers

    origin = getattr(diffusers, origin_name, None) if origin_name.endswith("Scheduler") else None
    return _defaults(origin) if inspect.isclass(origin) else {}


def _defaults(scheduler: type) -> dict[str, Any]:
    parameters = inspect.signature(scheduler).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _check_linear(name: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise where a step is not linear in the sample and the output, or cannot be reproduced."""
    for key in ("clip_sample", "thresholding"):
        if settings.get(key):
            default = "" if key in config else ", the default of diffusers"
            raise CheckpointError(
                f"sampler: {key} of {name} must be False, got {settings[key]!r}{default}; clipped "
                f"latents are not those of a latent video model and the step would not be linear: "
                f'write "{key}": false into scheduler_config.json'
            )
    if str(config.get("variance_type")).startswith("learned"):
        raise CheckpointError(
            f"sampler: variance_type must be fixed, got {config['variance_type']!r}; "
            "a network that predicts its variance is not supported"
        )
    if config.get("use_flow_sigmas"):
        raise CheckpointError(
            "sampler: use_flow_sigmas must be False, got True; "
            "flow matching is not a noise schedule of betas"
        )
    _require(name, settings, "prediction_type", PREDICTION_TYPES)
    if name == "DDPMScheduler":  # fixed_large_log is NaN in diffusers: the root of a logarithm
        _require(name, settings, "variance_type", ("fixed_small", "fixed_small_log", "fixed_large"))
    if name == "DPMSolverMultistepScheduler":
        _require(name, settings, "algorithm_type", ("dpmsolver++", "sde-dpmsolver++"))
        _require(name, settings, "solver_type", ("midpoint", "heun"))
        _require(name, settings, "solver_order", (1, 2))


def _check_numbers(name: str, settings: Mapping[str, Any]) -> None:
    """Raise where a number that is used before, or unchecked by, diffusers cannot be right."""
    for key in ("num_train_timesteps", "original_inference_steps"):
        count = settings.get(key, 1)
        if type(count) is not int or count < 1:
            raise CheckpointError(
                f"sampler: {key} of {name} must be a whole number above 0, got {count!r}"
            )
    for key in ("sigma_min", "sigma_max", "timestep_scaling"):
        value = settings.get(key)
        if value is not None and (type(value) not in (int, float) or not 0.0 < value < np.inf):
            raise CheckpointError(
                f"sampler: {key} of {name} must be a number above 0, got {value!r}"
            )


def _require(
    name: str, settings: Mapping[str, Any], key: str, allowed: tuple[str | int, ...]
) -> None:
    if settings[key] not in allowed:
        raise CheckpointError(
            f"sampler: {key} of {name} must be {' or '.join(map(repr, allowed))}, "
            f"got {settings[key]!r}; no other gives a step that is linear and reproducible"
        )


def _check_request(name: str, settings: Mapping[str, Any], steps: int, eta: float) -> None:
    limit = "num_train_timesteps"
    if name == "LCMScheduler" and settings["original_inference_steps"] < settings[limit]:
        limit = "original_inference_steps"
    if type(steps) is not int or not 1 <= steps <= settings[limit]:
        raise RequestError(
            f"sampler: steps of {name} must be a whole number, 1 to {settings[limit]} "
            f"({limit} of the checkpoint), got {steps!r}"
        )
    if type(eta) not in (int, float) or not 0.0 <= eta <= 1.0:
        raise RequestError(f"sampler: eta must be a number, 0 to 1, got {eta!r}")
    if eta and name != "DDIMScheduler":
        raise RequestError(
            f'sampler: eta belongs to DDIM alone, got eta={eta} with {name}; pass sampler="ddim"'
        )


def _build(name: str, settings: Mapping[str, Any], steps: int) -> Any:
    """The diffusers scheduler, its timesteps set and found usable."""
    import diffusers

    try:
        with warnings.catch_warnings():
            # diffusers 0.42 copies tensors into numpy 2 by the protocol of numpy 1; no result
            # depends on it. Drop once its schedulers call Tensor.numpy().
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            built = getattr(diffusers, name)(**settings)
            _check_betas(name, _float64(built.betas), settings["num_train_timesteps"])
            built.set_timesteps(steps)
    except InputError:
        raise
    except ImportError as error:
        raise MissingDependencyError(f"sampler: {name} as configured: {error}") from error
    except Exception as error:  # whatever diffusers trips over came from the configuration
        raise CheckpointError(
            f"sampler: the configuration of {name} must be one that diffusers accepts, "
            f"got {type(error).__name__}: {error}"
        ) from error
    _check_timesteps(name, built, settings, steps)
    return built


def _check_betas(name: str, betas: Column, count: int) -> None:
    if betas.shape != (count,) or not ((betas > 0.0) & (betas <= 1.0)).all():
        raise CheckpointError(
            f"sampler: the betas of {name} must be num_train_timesteps = {count} numbers above 0 "
            f"and at most 1, got {betas.size} from {betas.min(initial=np.inf):.3g} to "
            f"{betas.max(initial=-np.inf):.3g}; check beta_start, beta_end and trained_betas"
        )


def _check_timesteps(name: str, built: Any, settings: Mapping[str, Any], steps: int) -> None:
    """Raise where the spacing gives more or fewer timesteps, or some that were never trained."""
    timesteps, count = _float64(built.timesteps), settings["num_train_timesteps"]
    # Those with sigmas interpolate the noise schedule; the others look it up by the timestep.
    outside = not hasattr(built, "sigmas") and ((timesteps < 0) | (timesteps >= count)).any()
    if len(timesteps) != steps or outside:
        raise RequestError(
            f"sampler: {steps} steps of {name} must be {steps} timesteps in 0..{count - 1}, got "
            f"{len(timesteps)} from {timesteps.max():g} to {timesteps.min():g} with "
            f"timestep_spacing {settings['timestep_spacing']!r} and "
            f"steps_offset {settings['steps_offset']!r}; choose another number of steps"
        )


def _check_finite(name: str, columns: Columns) -> None:
    blind = (columns["source_signal"] == 0.0) & ~np.isfinite(columns["clean_from_sample"])
    if blind.any():
        raise CheckpointError(
            f"sampler: prediction_type of {name} must be 'v_prediction' or 'sample' where the "
            f"signal-to-noise ratio is zero, got 'epsilon' at timestep "
            f"{columns['timestep'][blind][0]:g}; set rescale_betas_zero_snr to false in "
            "scheduler_config.json, or timestep_spacing to 'leading'"
        )
    for key, column in columns.items():
        if not np.isfinite(column).all():
            step = int(np.argmin(np.isfinite(column)))
            raise CheckpointError(
                f"sampler: the noise schedule of {name} must give finite coefficients, got "
                f"{key} = {column[step]} at step {step}; check the betas in scheduler_config.json"
            )


def _ddim_columns(scheduler: Any, eta: float) -> Columns:
    """Denoising diffusion implicit models, eq. 12 and 16 (Song et al., arXiv:2010.02502).

    x' = a' c + √(b'² - τ²) · (x - a c) / b + τ ε,    τ = η · (b' / b) · √(1 - a² / a'²)

    As in diffusers, the step after is `num_train_timesteps // steps` below, whatever the spacing.
    """
    share, times = _float64(scheduler.alphas_cumprod), _timestep_indices(scheduler)
    after = times - scheduler.config.num_train_timesteps // len(times)
    now, then = share[times], share[np.maximum(after, 0)]
    then = np.where(after >= 0, then, float(scheduler.final_alpha_cumprod))
    variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
    # (b'² - τ²) / b'², written so that nothing cancels when eta is 1.
    kept = 1 - eta**2 + eta**2 * (now / then) * (1 - then) / (1 - now)
    direction = np.sqrt(kept * (1 - then) / (1 - now))
    return _variance_preserving(scheduler, times, now) | {
        "next_from_sample": direction,
        "next_from_clean": np.sqrt(then) - direction * np.sqrt(now),
        "noise": np.sqrt(variance),
        "draws_noise": np.full(len(times), eta > 0.0),
    }


def _ddpm_columns(scheduler: Any, eta: float) -> Columns:
    """Ancestral sampling, eq. 6 and 7 (Ho et al., arXiv:2006.11239), between the chosen timesteps.

    x' = a' β / b² · c + √(1 - β) b'² / b² · x + √v ε,    β = 1 - a² / a'²

    v = β b'² / b² (`fixed_small`, at least 1e-20 as in diffusers) or β (`fixed_large`), and no
    noise at timestep 0.
    """
    share, times = _float64(scheduler.alphas_cumprod), _timestep_indices(scheduler)
    now = share[times]
    then = np.append(now[1:], 1.0)
    beta = 1 - now / then
    if scheduler.config.variance_type == "fixed_large":
        variance = beta
    else:
        variance = np.maximum((1 - then) / (1 - now) * beta, 1e-20)
    return _variance_preserving(scheduler, times, now) | {
        "next_from_sample": np.sqrt(now / then) * (1 - then) / (1 - now),
        "next_from_clean": np.sqrt(then) * beta / (1 - now),
        "noise": np.where(times > 0, np.sqrt(variance), 0.0),
        "draws_noise": times > 0,
    }


def _lcm_columns(scheduler: Any, eta: float) -> Columns:
    """Multistep consistency sampling, alg. 3 (Luo et al., arXiv:2310.04378).

    c = c_out · ẑ + c_skip · x,    x' = a' c + b' ε,    and x' = c at the last step

    ẑ is the usual estimate from the output. With u = timestep · timestep_scaling and the data's
    deviation d = 0.5: c_skip = d² / (u² + d²), c_out = u / √(u² + d²).
    """
    share, times = _float64(scheduler.alphas_cumprod), _timestep_indices(scheduler)
    now = share[times]
    then = np.append(now[1:], 1.0)
    columns = _variance_preserving(scheduler, times, now)
    scaled, deviation = times * float(scheduler.config.timestep_scaling), 0.5
    skip = deviation**2 / (scaled**2 + deviation**2)
    out = scaled / np.sqrt(scaled**2 + deviation**2)
    return columns | {
        "clean_from_sample": out * columns["clean_from_sample"] + skip,
        "clean_from_output": out * columns["clean_from_output"],
        "next_from_sample": np.zeros(len(times)),
        "next_from_clean": np.sqrt(then),
        "noise": np.sqrt(1 - then),
        "draws_noise": np.arange(len(times)) < len(times) - 1,
    }


def _euler_columns(scheduler: Any, eta: float) -> Columns:
    """Euler's method without churn, alg. 2 (Karras et al., arXiv:2206.00364).

    x' = x + (s' - s) · (x - c) / s,    x = z + s · noise,    input_scale = 1 / √(s² + 1)
    """
    level = _float64(scheduler.sigmas)[: len(scheduler.timesteps) + 1]  # log_linear has one more
    now, then = level[:-1], level[1:]
    scale = 1 / np.sqrt(now**2 + 1)
    return _common(scheduler, signal=scale, noise=now * scale, input_scale=scale) | {
        "next_from_sample": then / now,
        "next_from_clean": 1 - then / now,
    }


def _dpm_columns(scheduler: Any, eta: float) -> Columns:
    """DPM-Solver++ in its multistep form, alg. 2 (Lu et al., arXiv:2211.01095), orders 1 and 2.

    With λ = log(a / b), h = λ' - λ, h₀ = λ - λ of the step before, D = (h / h₀) (c - c_former),
    and k = 1 for the ordinary, 2 for the stochastic differential equation (same paper, app. A):

    x' = (b' / b) e^{-(k-1)h} x + a' (1 - e^{-kh}) c + w D + [k = 2] b' √(1 - e^{-2h}) ε

    w is 0 in a step of first order, a' (1 - e^{-kh}) / 2 for `midpoint`, and
    a' (1 - (1 - e^{-kh}) / (k h)) for `heun`. First order are the first step, the last one where
    the configuration says so, and all with `solver_order` 1. e^{-h} is s' / s, so nothing
    overflows where the last level is 0.
    """
    config, steps = scheduler.config, len(scheduler.timesteps)
    stochastic = config.algorithm_type == "sde-dpmsolver++"
    level = _float64(scheduler.sigmas)
    now, then = level[:-1], level[1:]
    second = _second_order_steps(config, steps)
    repeated = second[1:] & (now[1:] >= now[:-1])
    if repeated.any():
        raise RequestError(
            f"sampler: {steps} steps of DPMSolverMultistepScheduler must fall in noise from one "
            f"to the next, got the same level at steps {int(repeated.argmax())} and "
            f"{int(repeated.argmax()) + 1}; use fewer steps"
        )
    signal, signal_then = 1 / np.sqrt(now**2 + 1), 1 / np.sqrt(then**2 + 1)
    power = 2 if stochastic else 1
    ratio = then / now
    gain = signal_then * (1 - ratio**power)
    rise = np.where(second, -np.log(np.where(second, ratio, 1.0)), 0.0)  # h
    before = np.where(second, -np.log(now / np.roll(now, 1)), 1.0)  # h₀
    if config.solver_type == "heun":
        mean = np.where(rise == 0.0, 1.0, (1 - ratio**power) / (power * rise))  # 1 is the limit
        slope = signal_then * (1 - mean)
    else:
        slope = gain / 2
    former = np.where(second, slope * rise / before, 0.0)
    # Two levels that are equal but for rounding would make the root imaginary.
    fresh = signal_then * then * np.sqrt(np.maximum(1 - ratio**2, 0.0))
    ones = np.ones(steps)
    return _common(scheduler, signal=signal, noise=now * signal, input_scale=ones) | {
        "next_from_sample": signal_then / signal * ratio**power,
        "next_from_clean": gain + former,
        "next_from_former": -former,
        "noise": fresh if stochastic else np.zeros(steps),
        "draws_noise": np.full(steps, stochastic),
    }


def _second_order_steps(config: Any, steps: int) -> NDArray[np.bool_]:
    """Which steps are of second order: all but the first, and the last where it must not be."""
    second = np.full(steps, config.solver_order == 2)
    second[0] = False
    if (
        config.euler_at_final
        or (config.lower_order_final and steps < 15)
        or config.final_sigmas_type == "zero"
    ):
        second[-1] = False
    return second


def _variance_preserving(scheduler: Any, times: NDArray[np.int64], share: Column) -> Columns:
    return _common(
        scheduler,
        signal=np.sqrt(share),
        noise=np.sqrt(1 - share),
        input_scale=np.ones(len(times)),
    )


def _common(scheduler: Any, *, signal: Column, noise: Column, input_scale: Column) -> Columns:
    """The columns that the noise schedule decides; those of the update are those of no noise.

    The network's input is y = input_scale · x = a z + b ε. Its output is ε (`epsilon`), z
    (`sample`) or v = a ε - b z (`v_prediction`: Salimans & Ho, arXiv:2202.00512, app. D), so
    z = (y - b m) / a, z = m or z = a y - b m.
    """
    zeros = np.zeros(len(signal))
    from_sample, from_output = {
        "epsilon": (input_scale / signal, -noise / signal),
        "v_prediction": (input_scale * signal, -noise),
        "sample": (zeros, np.ones(len(signal))),
    }[scheduler.config.prediction_type]
    return {
        "timestep": _float64(scheduler.timesteps),
        "input_scale": input_scale,
        "source_signal": signal,
        "source_noise": noise,
        "clean_from_sample": from_sample,
        "clean_from_output": from_output,
        "next_from_former": zeros,
        "noise": zeros,
        "draws_noise": zeros > 0,
    }


def _timestep_indices(scheduler: Any) -> NDArray[np.int64]:
    indices: NDArray[np.int64] = scheduler.timesteps.numpy()
    return indices


def _float64(values: Tensor) -> Column:
    column: Column = values.double().numpy()
    return column


_COLUMNS: dict[str, Callable[[Any, float], Columns]] = {
    "DDIMScheduler": _ddim_columns,
    "DDPMScheduler": _ddpm_columns,
    "EulerDiscreteScheduler": _euler_columns,
    "DPMSolverMultistepScheduler": _dpm_columns,
    "LCMScheduler": _lcm_columns,
}
