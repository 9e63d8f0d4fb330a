"""What MOFT guidance costs, against the schedule of the released algorithm written the plain way.

The released algorithm samples the clip a second time without guidance, at every step, and keeps its
keys and values. At a guided step it runs the whole network on both halves of classifier-free
guidance, with those keys and values from its second up block on, goes back from a loss on the
conditional half, and does that a few times; then it predicts. Ours stops at the tap, has the
conditional half alone, and runs the unguided clip in the window only, at its last step to the tap.
With n steps, g of them guided by i gradient steps each, both are

    released            2 n P            + g i R
    ours                (n + g - 1) P + K + g i T
    ours, own keys      n P              + g i T

where P is a prediction of both halves, R the released gradient, T ours, and K the keys and values
of the last guided step. On the embedded network all steps are run, and the same sum is made of its
parts, so that it is seen how far the arithmetic holds (on a CPU in processor time). The full-size
network, AnimateDiff on SD 1.5 with random weights in bfloat16, is measured by its parts. All ways
are timed in turn in one run, after they have shown the same gradient: in float32 with these weights
to 1e-4 of the largest value, and in bfloat16 with at most twice the released way's distance from
float32. That is of root mean squares, since the largest of so many errors differs by chance, and
float32 has the say: random features hardly move, so that rounding in bfloat16 is much of what is
left of a gradient.

Memory is what the gradient adds to weights and inputs, at most: ours over going back through the
whole network for the conditional half alone, and over the released gradient, which has two halves.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.measure import peak_memory
from kinetiq.bench.query_cost import Loop
from kinetiq.checkpoint import load_checkpoint
from kinetiq.control_tensors import KeyValueBank
from kinetiq.controls import ResolvedControls
from kinetiq.denoiser import NO_CONTROLS
from kinetiq.errors import WorkError
from kinetiq.families import SiteKind
from kinetiq.generation import denoise
from kinetiq.moft import AXES, DIRECTIONS, Knots, MotionChannels, middle
from kinetiq.moft_guidance import (
    GuidedClip,
    MoftGuidance,
    ResolvedMoftGuidance,
    guidance_gradients,
    resolve_moft_guidance,
)
from kinetiq.precision import exact_float32
from kinetiq.rows import Batch, ClipState, build_batch
from kinetiq.sprites import components
from kinetiq.taps import find_tap

STEPS = 25
QUICK_STEPS = 6
SIZES = {"cpu": (8, 16), "cuda": (16, 64)}  # frames and side of latents
ANIMATEDIFF: dict[str, Any] = {"cross_attention_dim": 768}
SMALL: dict[str, Any] = ANIMATEDIFF | {"block_out_channels": (64, 128, 256, 256)}
CLOSE = 1e-4  # of the largest gradient, in float32
SLACK = 2.0  # times the released way's error in a half type
SCALE = 7.5  # of classifier-free guidance
_TEXT = (77, 768)
_RESAMPLES = 2000

Keys = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """A network, and a clip that is guided in the middle of its steps.

    Args:
        loop: the network, its text and its sampler.
        guidance: towards a direction, with shared keys and values.
        sample: [channels, frames, h, w], the clip's latents.
        unguided: like `sample`, of the clip without guidance; it differs, as it does in a window.
    """

    loop: Loop
    guidance: ResolvedMoftGuidance
    sample: Tensor
    unguided: Tensor

    @property
    def step(self) -> int:
        """The guided step at which gradients are compared and timed."""
        return self.guidance.motion_steps[0]

    @property
    def tap(self) -> str:
        """Module path of the block that is read."""
        return self.guidance.tap


def make_case(loop: Loop) -> Case:
    """A clip of random latents that a direction guides by the released switches.

    Only its steps are short: random curves are far from any clip, and in strides towards them two
    ways that differ by rounding alone come to differ in everything.
    """
    _, frames, height, width = loop.shape
    control = MoftGuidance(direction="left", step_size=0.005)
    guidance = resolve_moft_guidance(
        control,
        shape=(frames, height, width),
        size=(height, width),
        steps=loop.table.steps,
        tap=find_tap(loop.denoiser.network),
        sites=loop.denoiser.sites,
        channels_of=functools.partial(random_channels, loop.denoiser.network),
        features_of=_no_reference,
        device=loop.device,
    )
    generator = torch.Generator().manual_seed(1)
    sample, noise = (torch.randn(loop.shape, generator=generator).to(loop.device) for _ in range(2))
    return Case(loop, guidance, sample, 0.9 * sample + 0.4 * noise)


def random_channels(network: nn.Module) -> MotionChannels:
    """Motion channels at random: what is wanted makes no difference to what it costs."""
    tap = find_tap(network)
    generator = torch.Generator().manual_seed(2)
    ends = torch.tensor([[0.0], [1.0]]).expand(2, tap.channels)
    return MotionChannels(
        family="animatediff",
        checkpoint="random",
        fingerprint="random",
        tap=tap.name,
        loadings=MappingProxyType(
            {axis: torch.randn(tap.channels, generator=generator) for axis in AXES}
        ),
        spread=MappingProxyType(dict.fromkeys(AXES, 1.0)),
        knots=MappingProxyType(
            {
                way: Knots(ends, torch.randn(2, tap.channels, generator=generator))
                for way in DIRECTIONS
            }
        ),
    )


def _no_reference(_: object) -> Tensor:
    raise WorkError("bench moft_cost: a direction must need no reference, but one was asked for")


def embedded_case(device: str, steps: int = STEPS) -> Case:
    """The embedded network with its weights, in float32."""
    network = load_checkpoint("sprites", device=device).unet
    text = (components.MAX_TOKENS, components.TEXT_WIDTH)
    side = components.SIZE // 2
    return make_case(
        Loop(network, frames=components.FRAMES, side=side, text_shape=text, steps=steps)
    )


def large_case(
    device: str,
    frames: int,
    side: int,
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """AnimateDiff of this configuration with random weights."""
    from diffusers import UNetMotionModel

    torch.manual_seed(0)
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = UNetMotionModel(**config)
    finally:
        torch.set_default_dtype(former)
    network.eval().requires_grad_(False)
    return make_case(Loop(network, frames=frames, side=side, text_shape=_TEXT, steps=STEPS))


def large_pair(device: str, frames: int, side: int, config: Mapping[str, Any]) -> tuple[Case, Case]:
    """The same weights in bfloat16, and in float32."""
    case = large_case(device, frames, side, config)
    exact = large_case(device, frames, side, config, torch.float32)
    # Random numbers depend on the type that they are drawn in.
    exact.loop.denoiser.network.load_state_dict(case.loop.denoiser.network.state_dict())
    return case, exact


# The released algorithm, the plain way.


def predict_both(case: Case, sample: Tensor, step: int) -> Tensor:
    """The network's output for both halves, the conditional one first."""
    return _run_whole(case, torch.stack([sample, sample]), step)


def _run_whole(case: Case, samples: Tensor, step: int) -> Tensor:
    loop = case.loop
    timesteps = torch.full((len(samples),), loop.table.row(step).timestep, device=loop.device)
    text = loop.text.to(loop.dtype).expand(len(samples), -1, -1)
    return loop.denoiser.predict(samples.to(loop.dtype), timesteps, text, NO_CONTROLS)


def released_keys(case: Case, sample: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A prediction of both halves, and its keys and values from the tap's block on."""
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), _hooked(case, seen.setdefault):
        return predict_both(case, sample, step), seen


def released_gradient(
    case: Case, sample: Tensor, step: int, keys: Keys | None, *, halves: int = 2
) -> Tensor:
    """The gradient by the clip's latents, through a run of the whole network.

    Args:
        case: what is guided.
        sample: [channels, frames, h, w].
        step: counted from 0.
        keys: of `released_keys`, for two halves; None: the clip's own.
        halves: 2, or 1 for the conditional half alone.
    """
    latents = sample.detach().requires_grad_()
    seen: list[Tensor] = []
    tap = case.loop.denoiser.network.get_submodule(case.tap)
    handle = tap.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        with torch.enable_grad(), _hooked(case, lambda name, own: keys[name] if keys else own):
            _run_whole(case, latents.expand(halves, *latents.shape), step)
            loss = plain_loss(seen[0].unflatten(0, (halves, -1))[0].float(), case.guidance)
            (gradient,) = torch.autograd.grad(loss, latents)
    finally:
        handle.remove()
    return gradient


def plain_loss(features: Tensor, guidance: ResolvedMoftGuidance) -> Tensor:
    """Of features [frames, channels, h, w]: mean square from the wanted curve, in the middle."""
    (target,) = guidance.targets
    moved = (features - features.mean(0))[:, target.channels].movedim(1, -1)
    curve = middle(moved).mean((1, 2))
    return guidance.weight * (curve - target.wanted[:, 0]).square().mean()


@contextmanager
def _hooked(case: Case, act: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Let `act` see, and replace, the keys and values from the tap's block on."""
    network = case.loop.denoiser.network
    first = _block(case.tap)
    handles = []
    for site in case.loop.denoiser.sites:
        if site.kind is not SiteKind.SPATIAL or _block(site.name) < first:
            continue
        for name in (f"{site.name}.to_k", f"{site.name}.to_v"):
            hook = functools.partial(_act, act, name)
            handles.append(network.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _act(
    act: Callable[[str, Tensor], Tensor], name: str, _: nn.Module, __: Any, output: Tensor
) -> Tensor:
    return act(name, output)


def _block(name: str) -> int:
    """The number of an up block; -1 for what runs before all of them."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "up_blocks" else -1


def run_released(case: Case) -> Tensor:
    """All steps of the released algorithm, from the noise that ours starts with."""
    generator = torch.Generator().manual_seed(0)
    guided = torch.randn(case.loop.shape, generator=generator).to(case.loop.device)
    unguided, guidance = guided, case.guidance
    for step in range(case.loop.table.steps):
        output, keys = released_keys(case, unguided, step)
        unguided = _advance(case, unguided, output, step)
        if step in guidance.motion_steps:
            for _ in range(guidance.iterations):
                gradient = released_gradient(case, guided, step, keys)
                guided = guided - guidance.step_size * guidance.mask * gradient
        with torch.no_grad():
            output = predict_both(case, guided, step)
        guided = _advance(case, guided, output, step)
    return guided


def _advance(case: Case, sample: Tensor, output: Tensor, step: int) -> Tensor:
    """A DDIM step."""
    row = case.loop.table.row(step)
    conditional, unconditional = output.float()
    mixed = unconditional + SCALE * (conditional - unconditional)
    clean = row.clean_from_sample * sample + row.clean_from_output * mixed
    advanced: Tensor = row.next_from_sample * sample + row.next_from_clean * clean
    return advanced


# Ours.


def run_ours(case: Case, guidance: ResolvedMoftGuidance) -> Tensor:
    """All steps of a guided clip."""
    loop = case.loop
    request = attrs.evolve(loop.request(None, 0), controls=ResolvedControls(guidance=guidance))
    ((_, latents),) = denoise(
        [(0, request)],
        loop.denoiser,
        lambda _: loop.text,
        channels=loop.shape[0],
        device=loop.device,
        dtype=loop.dtype,
        max_clips=1,
    )
    if not isinstance(latents, Tensor):
        raise latents
    return latents


def own_keys(guidance: ResolvedMoftGuidance) -> ResolvedMoftGuidance:
    """The same guidance without shared keys and values."""
    return attrs.evolve(guidance, sites=())


def our_keys(case: Case) -> Mapping[int, KeyValueBank]:
    """What the last guided step looks up of the unguided clip: one half, to the tap."""
    denoiser = case.loop.denoiser
    batch = _build(case, [_state(case, case.unguided)])
    kept: Mapping[int, KeyValueBank]
    with (
        torch.inference_mode(),
        denoiser.keeping(set(case.guidance.sites), batch.conditional) as kept,
    ):
        denoiser.features(batch.latents, batch.timesteps, batch.text, batch.controls, case.tap)
    return kept


def our_gradient(case: Case, keys: Mapping[int, KeyValueBank] | None) -> Tensor:
    """The gradient of the conditional half through the network as far as the tap."""
    clip = GuidedClip(
        state=_state(case, case.sample),
        sample=case.sample,
        input_scale=1.0,
        step=case.step,
        guidance=case.guidance,
        keys_values=keys,
    )
    build = functools.partial(_build, case)
    return guidance_gradients([clip], case.loop.denoiser, build)[0]


def _state(case: Case, sample: Tensor) -> ClipState:
    loop = case.loop
    return ClipState(
        latents=sample.to(loop.dtype),
        timestep=loop.table.row(case.step).timestep,
        text=loop.text.to(loop.dtype),
        negative_text=None,
        controls=ResolvedControls(),
    )


def _build(case: Case, states: Any) -> Batch:
    return build_batch(states, {}, len(case.loop.denoiser.sites))


# Measuring.


@exact_float32()
def require_agreement(case: Case, exact: Case | None = None) -> float:
    """How far the gradients of both ways are apart, with shared keys and values, and with own ones.

    Args:
        case: what is guided.
        exact: the same in float32, where `case` is of a half type.

    Returns:
        The larger of the largest errors in float32, as a share of the largest value.

    Raises:
        WorkError: they are not the same, so that their times must not be compared.
    """
    worst = 0.0
    for shared in (True, False):
        in_float32 = case if exact is None else exact
        wanted = _released(in_float32, shared=shared)
        apart = (_ours(in_float32, shared=shared) - wanted).abs().max()
        error = float(apart / wanted.abs().max().clamp_min(1e-30))
        if not error <= CLOSE:
            raise WorkError(
                f"bench moft_cost: both ways must have the same gradient to {CLOSE:g} of the "
                f"largest in float32, got {error:g}"
            )
        worst = max(worst, error)
        if exact is not None:
            _require_rounding(case, wanted, shared=shared)
    return worst


def _require_rounding(case: Case, wanted: Tensor, *, shared: bool) -> None:
    """Let ours be apart from float32 as the released way is in this type, and not further."""
    ours, theirs = (_size(way(case, shared=shared) - wanted) for way in (_ours, _released))
    # One rounding of the result is nobody's fault, however good the other is.
    allowed = SLACK * theirs + torch.finfo(case.loop.dtype).eps * _size(wanted)
    if not ours <= allowed:
        raise WorkError(
            f"bench moft_cost: in {case.loop.dtype} ours must err at most {allowed:g} from "
            f"float32, where the released way errs {theirs:g}, got {ours:g}"
        )


def _ours(case: Case, *, shared: bool) -> Tensor:
    return our_gradient(case, our_keys(case) if shared else None)


def _released(case: Case, *, shared: bool) -> Tensor:
    keys = released_keys(case, case.unguided, case.step)[1] if shared else None
    return released_gradient(case, case.sample, case.step, keys)


def _size(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.double().square().mean().sqrt())


def parts_of(case: Case) -> dict[str, Callable[[], object]]:
    """The parts of both schedules, by the letters at the top of this file."""
    _, released = released_keys(case, case.unguided, case.step)
    shared = our_keys(case)

    def predict() -> None:
        with torch.inference_mode():
            predict_both(case, case.sample, case.step)

    return {
        "P": predict,
        "R": functools.partial(released_gradient, case, case.sample, case.step, released),
        "K": functools.partial(our_keys, case),
        "T": functools.partial(our_gradient, case, shared),
    }


def schedules(case: Case) -> dict[str, dict[str, int]]:
    """How often each way runs each part."""
    steps, guided = case.loop.table.steps, len(case.guidance.motion_steps)
    gradients = guided * case.guidance.iterations
    return {
        "released": {"P": 2 * steps, "R": gradients},
        "shared": {"P": steps + guided - 1, "K": 1, "T": gradients},
        "own": {"P": steps, "T": gradients},
    }


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    device: str,
    progress: Progress,
    label: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Seconds of each call, [repeats]: all of them in turn, then all of them again."""
    on_gpu = device.startswith("cuda")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in progress.track(range(warmup + repeats), label):
        for name, call in calls.items():
            if on_gpu:
                torch.cuda.synchronize(device)
            began = clock()
            call()
            if on_gpu:
                torch.cuda.synchronize(device)
            if turn >= warmup:
                seconds[name].append(clock() - began)
    return {name: np.asarray(each) for name, each in seconds.items()}


def time_share(
    seconds: Mapping[str, np.ndarray], ours: Mapping[str, int], baseline: Mapping[str, int]
) -> Figure:
    """The time of ours over that of the baseline, both sums of medians of parts.

    The interval is a bootstrap over the turns, as in `kinetiq.bench.measure.time_ratio`.

    Args:
        seconds: of each part, [turns].
        ours: how often it runs each part.
        baseline: likewise.
    """
    turns = len(next(iter(seconds.values())))

    def ratio(chosen: Any) -> Any:
        medians = {name: np.median(each[chosen], axis=-1) for name, each in seconds.items()}
        sums = [
            sum(often * medians[name] for name, often in way.items()) for way in (ours, baseline)
        ]
        return sums[0] / sums[1]

    picks = np.random.default_rng(0).integers(turns, size=(_RESAMPLES, turns))
    value = float(ratio(np.arange(turns)))
    low, high = np.percentile(ratio(picks), [2.5, 97.5])
    return Figure(value, min(float(low), value), max(float(high), value), n=turns)


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Measure the embedded network, by all steps and by parts, then the full-size one."""
    device, quick = options.device, options.quick
    large = torch.device(device).type == "cuda"
    timing = functools.partial(
        time_in_turn,
        repeats=9 if large else 3,
        warmup=int(large),  # on a CPU a round takes minutes, and the gradients were run before
        device=device,
        progress=progress,
    )
    # On a CPU all steps take so long that other programs come and go meanwhile.
    clock = time.perf_counter if large else time.process_time
    embedded = embedded_case(device, QUICK_STEPS if quick else STEPS)
    figures = embedded_figures(embedded, functools.partial(timing, clock=clock))
    frames, side = SIZES[torch.device(device).type]
    config = SMALL if quick else ANIMATEDIFF
    case, exact = large_pair(device, frames, side, config)
    require_agreement(case, exact)
    del exact
    seconds, often = timing(parts_of(case), label="full size"), schedules(case)
    figures["moft_cost.time"] = time_share(seconds, often["shared"], often["released"])
    figures["moft_cost.time_unshared"] = time_share(seconds, often["own"], often["released"])
    del case
    prepare = functools.partial(large_case, device, frames, side, config)
    ways = {"ours": _run_gradient, "whole": _run_whole_gradient, "released": _run_both_halves}
    growth = {
        name: peak_memory(prepare, run, device=device).growth
        for name, run in progress.track(ways.items(), "memory", len(ways))
    }
    figures["moft_cost.memory"] = Figure(growth["ours"] / growth["whole"], n=1)
    figures["moft_cost.memory_released"] = Figure(growth["ours"] / growth["released"], n=1)
    return figures


def embedded_figures(case: Case, timing: Callable[..., dict[str, np.ndarray]]) -> dict[str, Figure]:
    """All steps and their parts, and how far apart what both say is."""
    figures = {"moft_cost.gradient_error": Figure(require_agreement(case))}
    whole = timing(
        {
            "released": functools.partial(run_released, case),
            "shared": functools.partial(run_ours, case, case.guidance),
            "own": functools.partial(run_ours, case, own_keys(case.guidance)),
        },
        label="embedded",
    )
    parts, often = timing(parts_of(case), label="embedded, parts"), schedules(case)
    apart = []
    for way, name in {"shared": "time", "own": "time_unshared"}.items():
        measured = time_share(whole, {way: 1}, {"released": 1})
        added_up = time_share(parts, often[way], often["released"])
        figures[f"moft_cost.embedded.{name}"] = measured
        figures[f"moft_cost.embedded.{name}_from_parts"] = added_up
        apart.append(abs(added_up.value / measured.value - 1.0))
    figures["moft_cost.arithmetic_error"] = Figure(max(apart))
    return figures


def _run_gradient(case: Case) -> None:
    our_gradient(case, our_keys(case))


def _run_whole_gradient(case: Case) -> None:
    released_gradient(case, case.sample, case.step, None, halves=1)


def _run_both_halves(case: Case) -> None:
    _, keys = released_keys(case, case.unguided, case.step)
    released_gradient(case, case.sample, case.step, keys)


BENCH = Bench(
    "moft_cost", "time and memory of MOFT guidance against the released schedule", measure
)
