"""A step of training a motion embedding on the full-size ZeroScope network, against plain ways.

And what it takes to train one on the embedded model, from a clip to a file, with nothing else on
the machine.

The released recipe, written the plain way, records spatial adapters throughout and puts both of
its passes into one graph. Ours computes the same gradients of the motion with the adapter as a
constant, one pass at a time. Weights are random and in bfloat16, and a way is timed only if its
gradients are as close to those of float32 as the released recipe's; a step's peak is what it adds
to the weights. Steps without recomputation are the plain autograd that recomputation is compared
with. The released code also checkpoints whole blocks, which is left out of both ways here:
recomputation is measured by itself.
"""

import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.measure import peak_memory, time_ratio
from kinetiq.denoiser import EagerDenoiser
from kinetiq.engine import Engine
from kinetiq.errors import WorkError
from kinetiq.motion_losses import Diffusion, mean_squared_error, motion_loss, read_diffusion
from kinetiq.motion_training import (
    CachedClip,
    EmbeddingLearner,
    EmbeddingOptions,
    Spatial,
    StepDraw,
    choose_blocks,
    draw_step,
    measure_blocks,
    motion_step,
    named_parameters,
    train_embedding,
)
from kinetiq.recomputation import Recomputation
from kinetiq.spatial_lora import Adapter, draw_low_rank, spatial_linears
from kinetiq.sprites.cases import transfer_pairs

ZEROSCOPE: dict[str, Any] = {
    "sample_size": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 1024,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
SIZES = {"cpu": (8, 32, 32), "cuda": (24, 40, 72)}  # frames, height and width of latents
GATE_SIZE = (4, 8, 8)  # at which gradients are compared, which in float32 takes its time
SLACK = 2  # times the released recipe's error in bfloat16, which other ways may make
RANK = 32


@dataclass(frozen=True, eq=False)
class State:
    """A network, what it learns from, and what it learns."""

    denoiser: EagerDenoiser
    diffusion: Diffusion
    learner: EmbeddingLearner
    clip: CachedClip
    draw: StepDraw
    spatial: Spatial
    recomputation: Recomputation


Way = Callable[[State], list[Tensor]]


def prepare(
    device: str,
    size: tuple[int, int, int],
    config: dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
) -> State:
    """The network with random weights, attached and frozen, and a random clip.

    Weights are drawn in bfloat16 and have the same values in any wider type.
    """
    from diffusers import UNet3DConditionModel

    torch.manual_seed(0)
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            network = UNet3DConditionModel(**config)
    finally:
        torch.set_default_dtype(former)
    network.eval().requires_grad_(False)
    nn.Module.to(network, dtype)  # diffusers' own warns of layers that it has none of
    denoiser = EagerDenoiser(network).attach()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((4, *size), generator=generator).to(device)
    text = torch.randn((77, config["cross_attention_dim"]), generator=generator).to(device)
    clip = CachedClip(latents, text)
    blocks = measure_blocks(denoiser, choose_blocks(denoiser.sites, ()), clip)
    learner = EmbeddingLearner(denoiser, blocks, size[0], latents.device)
    paths = spatial_linears(network, denoiser.family)
    weights = draw_low_rank(network, paths, RANK, generator)
    with torch.no_grad():  # what is zero would be the same with and without an adapter or a motion
        for low in weights.values():
            low.up.copy_(0.01 * torch.randn(low.up.shape, generator=generator))
        for tensor in learner.parameters.values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return State(
        denoiser=denoiser,
        diffusion=read_diffusion("DDIMScheduler", SCHEDULER),
        learner=learner,
        clip=clip,
        draw=replace(draw_step(0, 0, [clip], SCHEDULER["num_train_timesteps"], 0.0), clip=0),
        spatial=Spatial(Adapter(network, paths), (weights,)),
        recomputation=Recomputation(denoiser, learner.trained),
    )


def run_ours(state: State, *, recompute: bool = False) -> list[Tensor]:
    """Our step; returns the gradients of the motion."""
    found = motion_step(
        state.denoiser,
        state.diffusion,
        state.learner,
        state.clip,
        state.draw,
        spatial=state.spatial,
        recomputation=state.recomputation if recompute else None,
    )
    return list(found.gradients)


def run_released(state: State) -> list[Tensor]:
    """The released recipe the plain way: adapters recorded throughout, one graph, one backward."""
    clean = state.clip.latents[None]
    noise = state.draw.noise.to(clean)[None]
    noised = state.diffusion.noise(clean, noise, state.draw.timestep)
    target = state.diffusion.target(clean, noise, state.draw.timestep)
    dtype = next(state.denoiser.network.parameters()).dtype
    timesteps = torch.tensor([state.draw.timestep], device=clean.device)
    text = state.clip.text[None].to(dtype)
    frame = slice(state.draw.frame, state.draw.frame + 1)
    weights = state.spatial.weights[0]
    motion = list(state.learner.parameters.values())
    with state.spatial.adapter.acting(weights):
        one = state.denoiser.predict(noised[:, :, frame].to(dtype), timesteps, text)
        all_ = state.denoiser.predict(noised.to(dtype), timesteps, text, state.learner.controls())
    loss = mean_squared_error(one.to(clean.dtype), target[:, :, frame])
    loss = loss + motion_loss("hybrid", all_.to(clean.dtype), target, state.draw.anchor)
    parameters = [*motion, *named_parameters(weights).values()]
    gradients = torch.autograd.grad(loss, parameters)
    return list(gradients[: len(motion)])


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Measure a training on the embedded model, and the three ways of a step at full size."""
    seconds = train_embedded(options.device, quick=options.quick)
    whole = {"training_cost.embedded_seconds": Figure(seconds, n=1, unit="s")}
    return whole | full_size_figures(options, progress)


def train_embedded(device: str, *, quick: bool) -> float:
    """Seconds of a motion embedding of the embedded model by default options; quick: of 3 steps."""
    pair = transfer_pairs(1)[0]
    options = EmbeddingOptions(previews=0)
    first = replace(options, steps=3)  # what happens at first use is no part of it
    with TemporaryDirectory(prefix="kinetiq-") as name, Engine.load("sprites", device=device) as it:
        folder, reference, prompt = Path(name), pair.reference(), pair.caption.text
        train_embedding(it, reference, prompt, folder / "first.safetensors", first)
        began = time.perf_counter()
        path = folder / "motion.safetensors"
        train_embedding(it, reference, prompt, path, first if quick else options)
        return time.perf_counter() - began


def full_size_figures(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Measure the three ways: that they agree, their time, their peak."""
    device = options.device
    size = SIZES[torch.device(device).type]
    config = ZEROSCOPE
    if options.quick:
        size, config = GATE_SIZE, ZEROSCOPE | {"block_out_channels": (64, 128, 256, 256)}
    ways: dict[str, Way] = {
        "released": run_released,
        "ours": run_ours,
        "recompute": functools.partial(run_ours, recompute=True),
    }
    exact = run_released(prepare(device, GATE_SIZE, config, torch.float32))
    gc.collect()  # networks refer to themselves, and the next one needs the room
    state = prepare(device, GATE_SIZE, config)
    _require_agreement({name: run(state) for name, run in ways.items()}, exact)
    del state
    gc.collect()
    state = prepare(device, size, config)
    ways["ours"](state)  # what happens at first use at this size is no part of a step
    repeats = 3 if options.quick or not device.startswith("cuda") else 9
    ratios = {}
    for name, baseline in progress.track([("ours", "released"), ("recompute", "ours")], "time"):
        ratios[name] = time_ratio(
            functools.partial(ways[name], state),
            functools.partial(ways[baseline], state),
            repeats=repeats,
            warmup=0,
            device=device,
        )
    del state
    peaks = {
        name: peak_memory(functools.partial(prepare, device, size, config), run, device=device)
        for name, run in progress.track(ways.items(), "memory", len(ways))
    }
    growth = {name: peak.growth for name, peak in peaks.items()}
    return {
        "training_cost.time": ratios["ours"].figure,
        "training_cost.memory": Figure(growth["ours"] / growth["released"], n=1),
        "training_cost.recompute_time": ratios["recompute"].figure,
        "training_cost.recompute_memory": Figure(growth["recompute"] / growth["ours"], n=1),
    }


def _require_agreement(gradients: Mapping[str, Sequence[Tensor]], exact: Sequence[Tensor]) -> None:
    """Ways that do not compute the same are not compared."""
    errors = {name: worst_error(found, exact) for name, found in gradients.items()}
    allowed = SLACK * errors["released"] + torch.finfo(torch.bfloat16).eps
    for name in ("ours", "recompute"):
        if not errors[name] <= allowed:
            raise WorkError(
                f"bench training_cost: gradients of {name} must be within {allowed:g} of those of "
                f"float32 ({SLACK} times the released recipe's error), got {errors[name]:g}"
            )


def worst_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error of any gradient, in units of the largest value of its exact one."""
    errors = [
        (one.double() - other.double()).abs().max() / other.double().abs().max()
        for one, other in zip(got, exact, strict=True)
    ]
    return float(torch.stack(errors).max())  # not a number where one is not


BENCH = Bench("training_cost", "a step of motion training against the plain ways", measure)
