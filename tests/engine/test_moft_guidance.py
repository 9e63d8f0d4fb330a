"""MOFT guidance on tiny networks with random weights, against the plain way of doing it."""

import math
import warnings
from types import MappingProxyType, SimpleNamespace

import attrs
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from stock import load_stock, predict_stock, record_projections, replaced_projections

import kinetiq as kq
from kinetiq import engine as engine_module
from kinetiq import generation
from kinetiq.control_tensors import ControlTensors, KeyValueBank, KeyValueControl
from kinetiq.controls import ResolvedControls
from kinetiq.denoiser import EagerDenoiser
from kinetiq.families import SiteKind
from kinetiq.moft import DIRECTIONS, Knots, MotionChannels, reference_features, sprite_pan
from kinetiq.moft_guidance import (
    GuidedClip,
    MotionTarget,
    ResolvedMoftGuidance,
    _shared_sites,
    guidance_gradients,
    guidance_loss,
    guide,
    resolve_moft_guidance,
)
from kinetiq.motion_embedding import MotionEmbedding
from kinetiq.motion_file import MotionInfo
from kinetiq.motion_lora import MotionLora, lora_paths
from kinetiq.recomputation import Recomputed
from kinetiq.rows import ClipState, build_batch
from kinetiq.sprites.world import Scene, render, sample_sprite
from kinetiq.taps import Tap, find_tap
from kinetiq.text import encode_prompts

TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32
FRAMES, SIDE = 4, 16  # of the clips; their latents are half as wide
STRONG = {"weight": 300.0, "window": (0.25, 0.75)}  # moves tiny networks, in steps 2 and 3 of 4


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_equal(got, wanted):
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def some_channels(width, tap="up_blocks.1"):
    """Motion channels of no model: what guidance makes of them is what is tested."""
    times = torch.tensor([0.0, 1.0])[:, None].expand(2, width)
    return MotionChannels(
        family="any",
        checkpoint="any",
        fingerprint="any",
        tap=tap,
        loadings=MappingProxyType(
            {"horizontal": random(width, seed=1), "vertical": random(width, seed=2)}
        ),
        spread=MappingProxyType({"horizontal": 0.5, "vertical": 0.5}),
        knots=MappingProxyType(
            {
                way: Knots(times, 3 * random(2, width, seed=seed))
                for seed, way in enumerate(DIRECTIONS, start=3)
            }
        ),
    )


@pytest.fixture
def engine(engine, monkeypatch):
    """Calibration is `kinetiq.moft`'s, and would take longer than all else here."""
    monkeypatch.setattr(
        engine_module,
        "load_channels",
        lambda checkpoint, _, tap, **__: some_channels(
            find_tap(checkpoint.unet, tap).channels, tap
        ),
    )
    return engine


def half(side="left"):
    mask = np.zeros((SIDE, SIDE))
    mask[:, : SIDE // 2] = 1.0
    return mask if side == "left" else 1.0 - mask


def request(control=None, seed=3, **options):
    options = {"frames": FRAMES, "steps": 4, "guidance_scale": 3.0} | options
    return kq.Request("a red circle", control, seed=seed, **options)


def latents_of(engine, control=None, **options):
    return next(engine.generate_latents([request(control, **options)]))


def resolved(engine, control, **options):
    return engine.resolve(request(control, **options)).controls.guidance


def seen_at(network, tap, run):
    """What a block returns while `run` runs the whole network, [rows * frames, channels, h, w]."""
    seen = []
    handle = network.get_submodule(tap).register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    try:
        run()
    finally:
        handle.remove()
    return seen[0]


def plain_loss(features, guidance):
    """The loss of a direction over a region, of features [frames, channels, h, w]."""
    (target,) = guidance.targets
    region = target.region
    if region is None:
        region = torch.zeros(features.shape[2:])
        region[2:6, 2:6] = 1.0  # of 8 x 8
    area = F.interpolate(region[None, None], size=features.shape[2:], mode="area")[0, 0]
    moved = (features - features.mean(0))[:, target.channels]
    curve = (moved * area).sum((2, 3)) / area.sum()
    return guidance.weight * ((curve - target.wanted[:, 0]) ** 2).mean()


# The gradient.


def state_of(engine, controls=None, seed=5, dtype=torch.float32):
    text = encode_prompts(engine.checkpoint, ["a red circle", ""]).to(dtype)
    return ClipState(
        latents=random(4, FRAMES, 8, 8, seed=seed, dtype=dtype),
        timestep=501.0,
        text=text[0],
        negative_text=text[1],
        controls=controls or ResolvedControls(),
    )


def build_for(engine):
    def build(states):
        silent = encode_prompts(engine.checkpoint, [""])[0]
        return build_batch(states, {"": silent}, len(engine.denoiser.sites))

    return build


def guided_clip(engine, guidance, step=1, seed=5, **options):
    state = state_of(engine, seed=seed)
    return GuidedClip(state, state.latents, 1.0, step, guidance, **options)


def test_the_gradient_is_that_of_the_whole_network(engine, family, tiny_folder):
    """Of both halves of guidance, run to the end by stock modules; a loss written by hand."""
    guidance = resolved(engine, kq.MoftGuidance(direction="left", region=half(), **STRONG))
    clip = guided_clip(engine, guidance)
    (got,) = guidance_gradients([clip], engine.denoiser, build_for(engine))
    network = load_stock(tiny_folder(family), family).unet.requires_grad_(False)
    z = clip.sample[None].clone().requires_grad_()
    text = torch.stack([clip.state.text, clip.state.negative_text])
    features = seen_at(
        network,
        guidance.tap,
        lambda: predict_stock(network, family, z.repeat(2, 1, 1, 1, 1), 501.0, text),
    )
    (wanted,) = torch.autograd.grad(plain_loss(features[:FRAMES], guidance), z)
    assert wanted.abs().max() > 1e-3
    assert_equal(got, wanted[0])


LOSSES = {
    "curve": {},
    "position": {"loss": "position", "region": half()},
    "cosine": {"metric": "cosine"},
    "both": {"loss": "position", "metric": "cosine"},
    "all channels": {"feature": "content_removed"},
}


@pytest.fixture(scope="module")
def wide_denoisers():
    """Networks in float64, attached."""
    return {
        family: EagerDenoiser(build().double()).attach() for family, build in tiny.NETWORKS.items()
    }


def wide_guidance(denoiser, control, step_count=25):
    return resolve_moft_guidance(
        control,
        shape=(FRAMES, 8, 8),
        size=(SIDE, SIDE),
        steps=step_count,
        tap=find_tap(denoiser.network, control.tap),
        sites=denoiser.sites,
        channels_of=lambda: some_channels(32),
        features_of=lambda _: random(FRAMES, 8, 8, 32, seed=8),
        device=torch.device("cpu"),
    )


def wide_clip(guidance, step, sample=None):
    sample = random(4, FRAMES, 8, 8, dtype=torch.float64) if sample is None else sample
    text = random(5, tiny.CROSS_WIDTH, seed=1, dtype=torch.float64)
    state = ClipState(
        latents=sample,
        timestep=401.0,
        text=text,
        negative_text=None,
        controls=ResolvedControls(),
    )
    return GuidedClip(state, sample, 1.0, step, guidance)


def assert_finite_differences(denoiser, guidance, step):
    build = lambda states: build_batch(states, {}, len(denoiser.sites))
    clip = wide_clip(guidance, step)
    (gradient,) = guidance_gradients([clip], denoiser, build)

    def loss_at(sample):
        batch = build([attrs.evolve(wide_clip(guidance, step, sample)).state])
        features = denoiser.features(
            batch.latents, batch.timesteps, batch.text, batch.controls, guidance.tap
        )
        return guidance_loss(features[0], guidance, step)

    small = 1e-5
    way = random(*clip.sample.shape, seed=9, dtype=torch.float64)
    slope = (loss_at(clip.sample + small * way) - loss_at(clip.sample - small * way)) / (2 * small)
    along = (gradient * way).sum()
    # A central difference errs by its step squared, and rounding by eps over the step.
    assert abs(along - slope) <= 1e-5 * max(abs(slope), 1e-3 * gradient.norm() * way.norm())
    assert slope.abs() > 1e-9


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_the_gradient_agrees_with_finite_differences(wide_denoisers, family, options):
    denoiser = wide_denoisers[family]
    control = kq.MoftGuidance(direction="up", **options)
    assert_finite_differences(denoiser, wide_guidance(denoiser, control), step=4)


@pytest.mark.parametrize("step", [0, 7, 12], ids=["motion", "both", "correspondence"])
def test_the_gradient_of_a_drag_agrees_with_finite_differences(wide_denoisers, family, step):
    """The first frame's features are held, so their own gradient is no part of the difference."""
    denoiser = wide_denoisers[family]
    guidance = wide_guidance(denoiser, kq.MoftGuidance(points=[((3, 4), (12, 9.5))]))
    if step == 0:
        assert_finite_differences(denoiser, guidance, step)
        return
    build = lambda states: build_batch(states, {}, len(denoiser.sites))
    clip = wide_clip(guidance, step)
    (got,) = guidance_gradients([clip], denoiser, build)
    sample = clip.sample[None].clone().requires_grad_()
    text = clip.state.text[None]
    features = denoiser.features(sample, torch.tensor([401.0]), text, tap=guidance.tap)[0]
    loss = plain_drag(features, (3, 4), (12, 9.5))
    if step == 7:
        loss = loss + plain_loss(features.movedim(-1, 1), attrs.evolve(guidance, weight=1.0))
    (wanted,) = torch.autograd.grad(10.0 * loss, sample)
    torch.testing.assert_close(got, wanted[0], rtol=1e-6, atol=1e-9 * wanted.abs().max().item())


def plain_drag(features, start, end):
    """Follow a point through [frames, h, w, channels] with the sampling that PyTorch brings."""
    share = torch.linspace(0, 1, len(features), dtype=features.dtype)[:, None]
    start, end = (torch.tensor([point], dtype=features.dtype) for point in (start, end))
    place = start + share * (end - start)
    grid = (2 * (place + 0.5) / SIDE - 1)[:, None, None]
    found = F.grid_sample(
        features.movedim(-1, 1), grid, align_corners=False, padding_mode="border"
    )[:, :, 0, 0]
    return (found[1:] - found[:1].detach()).abs().mean()


def test_a_drag_sees_what_bilinear_sampling_sees():
    features = random(5, 6, 8, 3, dtype=torch.float64)
    control = kq.MoftGuidance(points=[((0, 0), (15, 15))], shared_keys_values=False)
    guidance = resolve(control, frames=5)
    wanted = 10.0 * plain_drag(features, (0, 0), (15, 15))
    torch.testing.assert_close(guidance_loss(features, guidance, 12), wanted)


class Echo:
    """A denoiser whose features are its latents, so that a gradient can be done by hand."""

    def features(self, latents, *_):
        return latents.movedim(1, -1)


def echo(sample, guidance, dtype=torch.float32, input_scale=1.0):
    state = ClipState(
        latents=(input_scale * sample).to(dtype),
        timestep=1.0,
        text=torch.zeros(1, 1),
        negative_text=None,
        controls=ResolvedControls(),
    )
    return GuidedClip(state, sample, input_scale, 0, guidance)


def echo_guidance(side=8, **options):
    target = MotionTarget(torch.zeros(FRAMES, 1, 4), channels=None, region=torch.ones(side, side))
    defaults = {
        "tap": "any",
        "targets": (target,),
        "paths": torch.zeros(0, FRAMES, 2),
        "motion_steps": range(1),
        "drag_steps": range(0),
        "mask": torch.ones(FRAMES, side, side),
        "sites": (),
        "iterations": 1,
        "step_size": 0.5,
        "weight": 10.0,
        "per_position": False,
        "metric": "mse",
        "feature": "moft",
        "recompute": "auto",
    }
    return ResolvedMoftGuidance(**(defaults | options))


def build_any(states):
    return build_batch(states, {}, 0)


def test_a_step_follows_the_gradient_as_often_as_is_asked():
    """Of latents themselves: mean_R of the deviation shrinks by a known factor each time."""
    sample = random(4, FRAMES, 8, 8)
    # d/dz of 10 / (F C) sum (mean_R m)^2 is 20 / (F C R) mean_R m at each of R positions.
    shrink = 1 - 0.5 * 20 / (FRAMES * 4 * 64)
    ((got, broken),) = guide([echo(sample, echo_guidance(iterations=3))], Echo(), build_any)
    before, after = ((x - x.mean(1, keepdim=True)).mean((2, 3)) for x in (sample, got))
    torch.testing.assert_close(after, shrink**3 * before)
    assert broken is None
    assert got.dtype == torch.float32


def test_the_step_is_the_same_whatever_the_scale_of_the_sample():
    """A sampler whose sample is 5 times the network's input moves that input as far."""
    sample = random(4, FRAMES, 8, 8)
    guidance = echo_guidance(step_size=50.0)
    ((wanted, _),) = guide([echo(sample, guidance)], Echo(), build_any)
    ((got, _),) = guide([echo(5 * sample, guidance, input_scale=0.2)], Echo(), build_any)
    torch.testing.assert_close(got, 5 * wanted)


def test_a_gradient_keeps_its_digits_in_float16():
    sample, side = 1e-3 * random(4, FRAMES, 64, 64), 64
    wanted = guidance_gradients([echo(sample, echo_guidance(side))], Echo(), build_any)
    got = guidance_gradients(
        [echo(sample.half().float(), echo_guidance(side), torch.float16)], Echo(), build_any
    )
    assert wanted.abs().max() < 6e-8  # which is the smallest number of float16 above zero
    assert (got - wanted).norm() < 0.02 * wanted.norm()


# What is left alone.


def test_latents_outside_the_mask_are_unchanged(engine):
    control = kq.MoftGuidance(direction="left", region=half(), guided_frames=3, **STRONG)
    clip = guided_clip(engine, resolved(engine, control))
    ((got, _),) = guide([clip], engine.denoiser, build_for(engine))
    moved = got != clip.sample
    assert not moved[:, :, :, 4:].any()
    assert not moved[:, 3].any()
    assert moved[:, :3, :, :4].float().mean() > 0.99


@pytest.mark.parametrize("options", [{"iterations": 0}, {"step_size": 0.0}])
def test_no_step_is_plain_generation_bit_for_bit(engine, options):
    control = kq.MoftGuidance(direction="left", **(STRONG | options))
    assert torch.equal(latents_of(engine, control), latents_of(engine))


def test_outside_the_window_nothing_moves(engine):
    """Guided in the last steps alone, a clip is bit for bit the plain one until then."""
    samples = {}

    def sampled(control):
        seen = samples.setdefault(control is None, [])
        step = generation._apply

        def spy(runs, *arguments):
            done = step(runs, *arguments)
            seen.extend(run.sample for run in runs)
            return done

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "_apply", spy)
            return latents_of(engine, control)

    control = kq.MoftGuidance(
        direction="left", shared_keys_values=False, weight=300.0, window=(0.5, 1.0)
    )
    guided, plain = sampled(control), sampled(None)
    same = [torch.equal(a, b) for a, b in zip(samples[False], samples[True], strict=True)]
    assert same == [True, True, False, False]
    assert (guided - plain).abs().max() > 0.01 * plain.abs().max()


# The whole, against the plain way.


def plain_guidance(engine, family, folder, control, shared):
    """As the released code: a second clip without guidance at every step, whole passes, hooks."""
    pipeline = load_stock(folder, family)
    network, scheduler = pipeline.unet.requires_grad_(False), pipeline.scheduler
    guidance = resolved(engine, control)
    names = [
        f"{site.name}.{projection}"
        for site in engine.denoiser.sites
        if site.kind is SiteKind.SPATIAL and site.name.startswith(guidance.tap)
        for projection in ("to_k", "to_v")
    ]
    text = encode_prompts(pipeline, ["", "a red circle"])
    scheduler.set_timesteps(4)
    guided = unguided = random(1, 4, FRAMES, 8, 8, seed=3)

    def advance(sample, t):
        uncond, cond = predict_stock(network, family, sample.repeat(2, 1, 1, 1, 1), t, text)
        return scheduler.step(uncond + 3.0 * (cond - uncond), t, sample[0]).prev_sample[None]

    def run(sample, t):
        return predict_stock(network, family, sample, t, text[1:])

    for step, t in enumerate(scheduler.timesteps):
        seen = record_projections(network, names, lambda t=t, z=unguided: run(z, t))
        for _ in range(guidance.iterations if step in guidance.motion_steps else 0):
            z = guided.clone().requires_grad_()
            with replaced_projections(
                network, names if shared else [], lambda name, _, seen=seen: seen[name]
            ):
                features = seen_at(network, guidance.tap, lambda t=t, z=z: run(z, t))
            (gradient,) = torch.autograd.grad(plain_loss(features, guidance), z)
            guided = guided - guidance.step_size * guidance.mask * gradient
        guided, unguided = advance(guided, t), advance(unguided, t)
    return guided[0]


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "own keys"])
def test_equals_the_plain_two_pass_way(engine, family, tiny_folder, shared):
    switches = STRONG | {"weight": 5.0}  # pulled harder, rounding runs away with it
    control = kq.MoftGuidance(
        direction="right", region=half(), shared_keys_values=shared, **switches
    )
    wanted = plain_guidance(engine, family, tiny_folder(family), control, shared)
    got = latents_of(engine, control)
    assert_equal(got, wanted)
    other = attrs.evolve(control, shared_keys_values=not shared)
    for without in (latents_of(engine), latents_of(engine, other)):
        assert (got - without).abs().max() > 10 * TOLERANCE * wanted.abs().max()


def test_the_network_runs_no_more_than_it_must(engine, monkeypatch):
    """The unguided branch in the window only, and at its end only half of it, to the tap."""
    rows = {"predict": [], "features": []}
    for name, seen in rows.items():
        run = getattr(EagerDenoiser, name)

        def count(self, latents, *arguments, run=run, seen=seen):
            seen.append(len(latents))
            return run(self, latents, *arguments)

        monkeypatch.setattr(EagerDenoiser, name, count)
    control = kq.MoftGuidance(direction="left", shared_keys_values=False, window=(0.25, 0.75))
    latents_of(engine, control)
    assert rows == {"predict": [2, 2, 2, 2], "features": [1, 1, 1, 1]}
    for seen in rows.values():
        seen.clear()
    latents_of(engine, attrs.evolve(control, shared_keys_values=True))
    assert rows == {"predict": [2, 2, 2, 2, 2], "features": [1, 1, 1, 1, 1]}


def test_the_unguided_branch_draws_the_same_noise(engine, monkeypatch):
    """Pulled by nothing, a clip is its own unguided branch: the keys it is given are its own."""
    given = []
    move = generation.guide

    def spy(clips, denoiser, build, **options):
        for clip in clips:
            features = []
            for keys in (clip.keys_values, None):
                clip_with = attrs.evolve(clip, keys_values=keys)
                batch = build([clip_with.state])
                control = None
                if keys is not None:
                    slot = torch.zeros(len(batch.latents), dtype=torch.int64)
                    slot[batch.conditional] = 1
                    control = KeyValueControl(slot, keys)
                features.append(
                    denoiser.features(
                        batch.latents,
                        batch.timesteps,
                        batch.text,
                        ControlTensors(key_value=control),
                        "up_blocks.1",
                    )
                )
            given.append(tuple(features))
        return move(clips, denoiser, build, **options)

    monkeypatch.setattr(generation, "guide", spy)
    control = kq.MoftGuidance(direction="left", weight=0.0, window=(0.25, 1.0))
    latents_of(engine, control, eta=1.0)
    assert len(given) == 3
    for shared, own in given:
        assert_equal(shared, own)


# Batches.


def test_neighbours_do_not_change_a_result(engine, reference):
    """Several guided at once, of all kinds, with other steps and controls beside them."""
    gently = STRONG | {"weight": 30.0}  # what is pulled hard runs away, and its rounding with it
    controls = [
        (kq.MoftGuidance(direction="left", **gently), {}),
        (kq.MoftGuidance(reference, weight=30.0, feature="content_removed"), {"steps": 5}),
        (None, {"guidance_scale": 1.0}),
        (
            kq.MoftGuidance(
                regions=[
                    kq.MoftRegion(half(), direction="up"),
                    kq.MoftRegion(half("right"), reference=reference),
                ],
                **(gently | {"iterations": 3, "shared_keys_values": False}),
            ),
            {"sampler": "euler"},
        ),
        (
            [
                kq.MoftGuidance(points=[((2, 3), (12, 9))], weight=50.0),
                kq.QueryInjection(reference, sites="both"),
            ],
            {"guidance_scale": 1.0},
        ),
        (
            [
                kq.MotionInjection(reference),
                kq.MoftGuidance(direction="down", tap="up_blocks.2", **gently),
            ],
            {"eta": 1.0},
        ),
    ]
    requests = [request(control, seed=seed, **o) for seed, (control, o) in enumerate(controls)]
    together = list(engine.generate_latents(requests, max_clips=4))
    for asked, got in zip(requests, together, strict=True):
        alone = next(engine.generate_latents([asked]))
        assert_equal(got, alone)
        if asked.control:
            left = [c for c in asked.control if not isinstance(c, kq.MoftGuidance)]
            plain = next(engine.generate_latents([attrs.evolve(asked, control=left)]))
            assert (got - plain).abs().max() > 10 * TOLERANCE * got.abs().max()


def test_the_same_request_gives_the_same_bits(engine):
    control = kq.MoftGuidance(points=[((2, 3), (12, 9))], weight=50.0)
    first, second = (latents_of(engine, control) for _ in range(2))
    assert torch.equal(first, second)


def test_works_where_the_caller_is_in_inference_mode(engine, reference):
    control = kq.MoftGuidance(reference, metric="cosine", window=(0.25, 0.75))
    wanted = latents_of(engine, control)
    with torch.inference_mode():
        got = latents_of(engine, control)
    assert torch.equal(got, wanted)


def learned(engine, kind):
    """A motion of random tensors at all temporal sites."""
    network, sites = engine.checkpoint.unet, engine.denoiser.sites
    info = MotionInfo(kind=kind, family=engine.family.name, frames=FRAMES, height=8, width=8)
    if kind == "lora":
        linears = {p: network.get_submodule(p) for p in lora_paths(network, engine.family, "k")}
        down = {p: random(2, x.in_features, seed=1) / 4 for p, x in linears.items()}
        up = {p: random(x.out_features, 2, seed=2) for p, x in linears.items()}
        return MotionLora(down, up, info=info, highway="all", noise_prior=0.0)
    widths = {s.name.rpartition(".")[0]: s.width for s in sites if s.kind is SiteKind.TEMPORAL}
    query_key = {block: random(FRAMES, width, seed=3) for block, width in widths.items()}
    return MotionEmbedding(query_key=query_key, info=info, debias="none", noise_prior=0.0)


@pytest.mark.parametrize("kind", ["injection", "embedding", "lora"])
def test_other_controls_act_in_the_guidance_as_in_the_prediction(engine, reference, kind):
    """The gradient is that of features which the whole prediction makes, source row and all."""
    other = kq.MotionInjection(reference) if kind == "injection" else learned(engine, kind)
    asked = engine.resolve(request([kq.MoftGuidance(direction="left", **STRONG), other]))
    state = generation._state(
        SimpleNamespace(
            request=asked,
            step=1,
            sample=random(4, FRAMES, 8, 8),
            text=state_of(engine).text,
            negative_text=None,
        ),
        torch.float32,
    )
    clip = GuidedClip(state, state.latents, 1.0, 1, asked.controls.guidance)
    (got,) = guidance_gradients([clip], engine.denoiser, build_for(engine))
    batch = build_for(engine)([state])
    assert len(batch.latents) == (2 if kind == "injection" else 1)
    z = batch.latents.clone().requires_grad_()

    def wanted(controls):
        features = seen_at(
            engine.denoiser.network,
            "up_blocks.1",
            lambda: engine.denoiser.predict(z, batch.timesteps, batch.text, controls),
        )
        return torch.autograd.grad(plain_loss(features[:FRAMES], clip.guidance), z)[0][0]

    assert_equal(got, wanted(batch.controls))
    without = wanted(ControlTensors())
    assert (got - without).abs().max() > 0.01 * without.abs().max()


# Memory.


@pytest.fixture
def tight(monkeypatch):
    """Guidance that runs out of memory where `full` says so, of (rows, whether it recomputes)."""
    run = EagerDenoiser.features
    tight = SimpleNamespace(full=lambda *_: False, seen=[])

    def features(self, latents, *arguments):
        recomputes = any(isinstance(module, Recomputed) for module in self.network.modules())
        tight.seen.append((len(latents), recomputes))
        if tight.full(len(latents), recomputes):
            raise torch.OutOfMemoryError("out of memory")
        return run(self, latents, *arguments)

    monkeypatch.setattr(EagerDenoiser, "features", features)
    return tight


def pair(**options):
    control = kq.MoftGuidance(direction="left", shared_keys_values=False, **(STRONG | options))
    return [request(control, seed=seed) for seed in (1, 2)]


def test_recomputing_gives_the_same_bits(engine, tight):
    asked = pair()[0]
    wanted = next(engine.generate_latents([asked]))
    assert not any(recomputes for _, recomputes in tight.seen)
    tight.seen.clear()
    got = next(engine.generate_latents(pair(recompute=True)[:1]))
    assert tight.seen == [(1, True)] * 4
    assert torch.equal(got, wanted)
    modules = engine.denoiser.network.modules()
    assert not any(isinstance(module, Recomputed) for module in modules)


def test_memory_that_runs_out_splits_the_guided_clips_and_then_recomputes(engine, tight):
    wanted = list(engine.generate_latents(pair()))
    tight.seen.clear()
    tight.full = lambda rows, recomputes: rows > 1 or not recomputes
    for got, whole in zip(engine.generate_latents(pair()), wanted, strict=True):
        assert_equal(got, whole)
    assert tight.seen == [(2, False), (1, False)] + [(1, True)] * 8  # found out once


@pytest.mark.parametrize("recompute", [False, "auto"])
def test_a_clip_that_does_not_fit_says_so_and_the_rest_goes_on(engine, tight, recompute):
    tight.full = lambda *_: True
    requests = [*pair(recompute=recompute), request()]
    results = list(engine.generate_many(requests, on_error="return"))
    for result in results[:2]:
        assert isinstance(result, kq.WorkError)
        assert "one clip of 4 frames of 8x8 latents must fit in the memory" in str(result)
    assert isinstance(results[2], kq.Clip)


# What breaks.


def test_what_is_not_finite_is_named_with_its_step(engine):
    control = kq.MoftGuidance(direction="left", step_size=1e38, weight=1e9, window=(0.5, 1.0))
    requests = [
        request(control),
        request(kq.MoftGuidance(direction="left", **STRONG)),
        request(),
    ]
    results = list(engine.generate_many(requests, on_error="return"))
    assert isinstance(results[0], kq.NonFiniteError)
    for words in (
        "at step 3 of 4, gradient step 1 of 2, of request 0 ('a red circle')",
        "a smaller step_size than 1e+38, a smaller weight than 1e+09",
    ):
        assert words in str(results[0])
    assert [type(result) for result in results[1:]] == [kq.Clip] * 2


# From what is asked to data.


def resolve(control, frames=FRAMES, steps=25, size=(SIDE, SIDE), width=3, sites=(), **options):
    defaults = {
        "shape": (frames, size[0] // 2, size[1] // 2),
        "size": size,
        "steps": steps,
        "tap": Tap("up_blocks.1", width),
        "sites": sites,
        "channels_of": lambda: some_channels(width),
        "features_of": lambda _: random(frames, 6, 8, width, seed=8),
        "device": torch.device("cpu"),
    }
    return resolve_moft_guidance(control, **(defaults | options))


def own_keys(**options):
    return kq.MoftGuidance(**({"shared_keys_values": False} | options))


@pytest.mark.parametrize(("steps", "guided"), [(25, range(3, 12)), (50, range(6, 24))])
def test_the_window_is_the_released_one(steps, guided):
    guidance = resolve(own_keys(direction="left"), steps=steps)
    assert (guidance.motion_steps, guidance.drag_steps) == (guided, range(0))
    assert [guidance.acts(step) for step in range(steps)] == [s in guided for s in range(steps)]


def test_a_drag_is_guided_by_motion_then_both_then_correspondence():
    guidance = resolve(own_keys(points=[((1, 2), (3, 4))]))
    assert guidance.motion_steps == range(8)  # 25 to 18 remain
    assert guidance.drag_steps == range(7, 21)  # 18 to 5 remain
    assert guidance.acts(20) and not guidance.acts(21)


@pytest.mark.parametrize("steps", range(2, 26))
def test_a_drag_has_all_its_phases_whatever_the_rounding(steps):
    guidance = resolve(own_keys(points=[((1, 2), (3, 4))]), steps=steps)
    both = set(guidance.motion_steps) & set(guidance.drag_steps)
    assert both and guidance.motion_steps.start == 0
    assert guidance.drag_steps.stop >= guidance.motion_steps.stop
    assert not guidance.acts(steps - 1)  # what is asked for is 5 of 25 steps that are left alone


@pytest.mark.parametrize(
    ("window", "motion", "drag"),
    [
        ((1.0, 0.0, 0.0), range(4), range(1, 4)),  # to the end where it is asked for
        ((0.5, 0.5, 0.25), range(3), range(3, 3)),  # none of both
        ((0.0, 0.0, 0.0), range(4), range(4, 4)),
        ((1.0, 1.0, 1.0), range(1), range(1, 1)),
    ],
)
def test_the_window_of_a_drag_is_what_is_asked_for(window, motion, drag):
    guidance = resolve(own_keys(points=[((1, 2), (3, 4))], drag_window=window), steps=4)
    assert (guidance.motion_steps, guidance.drag_steps) == (motion, drag)


def test_a_direction_is_synthesised_in_the_channels_of_both_axes():
    """So that it does not drift along the other."""
    width = 50
    guidance = resolve(own_keys(direction="up", speed=0.5), width=width)
    (target,) = guidance.targets
    channels = some_channels(width)
    assert target.channels.tolist() == channels.select().tolist()
    wanted = 0.5 * channels.synthesise("up", FRAMES)[:, target.channels]
    torch.testing.assert_close(target.wanted[:, 0], wanted)


@pytest.mark.parametrize(
    "wanted", [{"direction": "up"}, {"points": [((4, 10), (4, 3.6))]}], ids=["direction", "drag"]
)
def test_what_drifts_along_the_other_axis_is_not_as_wanted(wanted):
    width = 50
    channels = some_channels(width)
    guidance = resolve(own_keys(**wanted), width=width)
    drift = channels.synthesise("right", FRAMES)
    drift[:, channels.select("vertical")] = 0.0
    curve = channels.synthesise("up", FRAMES)
    right, drifting = (one[:, None, None].expand(-1, 6, 8, -1) for one in (curve, curve + drift))
    assert guidance_loss(right, guidance, 4) < 1e-9
    assert guidance_loss(drifting, guidance, 4) > 0.1


@pytest.mark.parametrize("loss", ["curve", "position"])
def test_a_direction_without_a_region_is_compared_in_the_middle(loss):
    """Where its pans were read; latents may change everywhere."""
    guidance = resolve(own_keys(direction="up", loss=loss))
    (target,) = guidance.targets
    assert guidance.mask.all()
    features = torch.zeros(FRAMES, 6, 8, 3)
    features[:, 1:4, 2:6, target.channels] = target.wanted[:, None]
    assert guidance_loss(features, guidance, 5) < 1e-9
    assert guidance_loss(features.roll(1, 1), guidance, 5) > 1e-3


@pytest.fixture(scope="module")
def pans_of_sprites():
    """What the embedded model makes of pans of two pictures, and of them at rest."""
    rng = np.random.default_rng(5)
    with kq.Engine.load("sprites") as engine:
        scenes = [
            Scene((sample_sprite(rng, motion="still", room=0.25),), background_hue=hue)
            for hue in (40.0, 250.0)
        ]
        clips = {way: [sprite_pan(scene, way, 8, 32) for scene in scenes] for way in DIRECTIONS}
        clips["still"] = [kq.Clip.from_array(frames) for frames in render(scenes, 8, 32)]
        latents = torch.stack([engine.encode(clip) for group in clips.values() for clip in group])
        features = reference_features(engine.checkpoint, engine.denoiser, latents)
        guidances = {
            way: engine.resolve(kq.Request("any", kq.MoftGuidance(direction=way))).controls.guidance
            for way in DIRECTIONS
        }
    return dict(zip(clips, features.split(2), strict=True)), guidances


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pan_of_the_embedded_model_is_near_to_its_direction(pans_of_sprites, direction):
    """And far from it is what stands still, and what goes in any other direction."""
    features, guidances = pans_of_sprites
    guidance = guidances[direction]
    loss = {
        way: sum(float(guidance_loss(clip, guidance, guidance.motion_steps[0])) for clip in clips)
        for way, clips in features.items()
    }
    own = loss.pop(direction)
    assert own < 0.6 * loss["still"]
    assert own < 0.6 * min(loss.values())
    back = {"left": "right", "right": "left", "up": "down", "down": "up"}[direction]
    assert own < 0.25 * loss[back]


def test_a_reference_is_read_in_the_channels_of_both_axes(reference):
    width = 50
    where = half()
    features = random(FRAMES, 6, 8, width, seed=8)
    guidance = resolve(
        own_keys(reference=reference, reference_region=where),
        width=width,
        features_of=lambda clip: features if clip is reference else None,
    )
    (target,) = guidance.targets
    assert target.channels.tolist() == some_channels(width).select().tolist()
    moved = (features - features.mean(0))[..., target.channels]
    torch.testing.assert_close(target.wanted[:, 0], moved[:, :, :4].mean((1, 2)))
    assert target.region is None
    (target,) = resolve(
        own_keys(reference=reference), width=width, features_of=lambda _: features
    ).targets
    torch.testing.assert_close(target.wanted[:, 0], moved[:, 1:4, 2:6].mean((1, 2)))
    (target,) = resolve(
        own_keys(reference=reference, loss="position", feature="content_removed"),
        width=width,
        features_of=lambda _: features,
    ).targets
    assert target.channels is None
    assert target.region.all()
    torch.testing.assert_close(target.wanted, (features - features.mean(0)).flatten(1, 2))
    (target,) = resolve(
        own_keys(reference=reference, feature="raw"),
        width=width,
        features_of=lambda _: features,
    ).targets
    torch.testing.assert_close(target.wanted[:, 0], features[:, 1:4, 2:6].mean((1, 2)))


def test_features_that_are_as_wanted_have_no_loss(reference):
    features = random(FRAMES, 6, 8, 3, seed=8)
    for options in (
        {},
        {"loss": "position"},
        {"metric": "cosine"},
        {"feature": "raw"},
        {"feature": "raw", "loss": "position"},
    ):
        guidance = resolve(own_keys(reference=reference, **options))
        assert guidance_loss(features, guidance, 5) < 1e-5
        assert guidance_loss(features.flip(0), guidance, 5) > 1e-2


def test_each_region_has_its_motion_and_its_place():
    guidance = resolve(
        own_keys(
            regions=[
                kq.MoftRegion(half(), direction="left"),
                kq.MoftRegion(half("right"), direction="right"),
            ],
            guided_frames=2,
        )
    )
    left, right = guidance.targets
    assert left.region[:, :4].all() and not left.region[:, 4:].any()
    assert torch.equal(right.region, 1 - left.region)
    assert not torch.equal(left.wanted, right.wanted)
    assert guidance.mask[:2].all() and not guidance.mask[2:].any()


def test_a_drag_moves_what_is_near_its_line_by_its_length():
    width = 50
    guidance = resolve(own_keys(points=[((4, 4), (12, 4)), ((2, 14), (2, 14))]), width=width)
    dragged, held = guidance.targets
    channels = some_channels(width)
    assert dragged.channels.tolist() == channels.select().tolist()
    wanted = channels.synthesise_way(8 / SIDE, 0.0, FRAMES)[:, dragged.channels]
    torch.testing.assert_close(dragged.wanted[:, 0], wanted)
    assert held.channels.tolist() == channels.select().tolist()
    assert not held.wanted.any()
    inside = dragged.region > 0
    assert inside[1:4, 2:7].all()
    assert not inside[4:].any()
    assert guidance.mask.all()  # the latents are free everywhere
    path = guidance.paths[0] * SIDE - 0.5
    wanted = torch.stack([torch.linspace(4, 12, FRAMES), torch.full((FRAMES,), 4.0)], dim=1)
    torch.testing.assert_close(path.float(), wanted)


def test_a_region_is_shared_out_between_drags():
    region = np.ones((SIDE, SIDE))
    guidance = resolve(own_keys(points=[((2, 2), (2, 13)), ((13, 2), (13, 13))], region=region))
    first, second = guidance.targets
    assert torch.equal(first.region + second.region, torch.ones(8, 8))
    assert first.region[:, :3].all() and second.region[:, 5:].all()


def test_the_wanted_motion_is_asked_for_only_where_it_is_needed(reference):
    def never(*_):
        raise AssertionError("was asked")

    resolve(own_keys(direction="left"), features_of=never)
    resolve(own_keys(reference=reference, feature="raw"), channels_of=never)


def test_a_reference_is_inverted_once_for_all_that_read_it(engine, reference, monkeypatch):
    seen = []
    read = engine_module.reference_feature
    monkeypatch.setattr(
        engine_module, "reference_feature", lambda *a, **k: seen.append(a[-1]) or read(*a, **k)
    )
    controls = [
        kq.MoftGuidance(reference),
        kq.MoftGuidance(reference, metric="cosine"),
        kq.MoftGuidance(reference, tap="mid_block", shared_keys_values=False),
    ]
    list(engine.generate_latents([request(control) for control in controls]))
    assert seen == ["up_blocks.1", "mid_block"]


def test_every_temporal_attention_of_a_block_can_be_read(engine, reference):
    """Also the first, behind which a spatial attention of its block lies that is not reached."""
    block = [s for s in engine.denoiser.sites if s.name.startswith("up_blocks.1.")]
    spatial = [s.name for s in block if s.kind is SiteKind.SPATIAL]
    temporal = [s.name for s in block if s.kind is SiteKind.TEMPORAL]
    assert len(spatial) > 1
    tap = find_tap(engine.denoiser.network, temporal[0], engine.denoiser.sites)
    control = own_keys(reference=reference, shared_keys_values=True)
    shared = _shared_sites(control, tap, engine.denoiser.sites)
    assert [engine.denoiser.sites[index].name for index in shared] == spatial[:1]
    control = kq.MoftGuidance(reference, tap=tap.name, feature="content_removed", **STRONG)
    assert (latents_of(engine, control) - latents_of(engine, None)).abs().max() > TOLERANCE


def test_a_first_use_says_how_far_it_is(engine, reference, monkeypatch):
    """Of a model without channels: finding them takes longer than a clip."""

    def load(checkpoint, _, tap, *, progress):
        progress("calibrating", 3, 64)
        return some_channels(find_tap(checkpoint.unet, tap).channels, tap)

    monkeypatch.setattr(engine_module, "load_channels", load)
    told = []
    asked = request(kq.MoftGuidance(reference))
    next(engine.generate_latents([asked], progress=lambda *words: told.append(words)))
    assert told[0] == ("calibrating", 3, 64)
    assert "inverting" in {stage for stage, _, _ in told}


def test_equal_controls_are_equal_and_can_be_kept_in_a_set(reference):
    first, second = (kq.MoftGuidance(reference, region=half()) for _ in range(2))
    assert first == second
    assert len({first, second}) == 1
    assert first != kq.MoftGuidance(reference, region=half("right"))


REFERENCE = kq.Clip.from_array(np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "guidance: exactly one of reference, direction, regions, points .* got none; several"),
        (
            {"direction": "left", "points": [((1, 1), (2, 2))]},
            "exactly one of .* got direction and points",
        ),
        ({"direction": "sideways"}, "direction: must be one of left, right, up, down, got 'sidew"),
        ({"reference": "clip.mp4"}, "reference: must be a Clip, got str; read a file with"),
        (
            {"reference": kq.Clip.from_array(np.zeros((1, 8, 8, 3), np.uint8))},
            "reference: must have at least 2 frames",
        ),
        ({"direction": "left", "speed": -1}, "speed: must be a number from 0 to 100, got -1"),
        ({"reference": REFERENCE, "speed": 2.0}, "speed: must be left out with a reference, .* 2"),
        ({"direction": "left", "window": (0.5, 0.5)}, "window: must be two shares .* got"),
        ({"direction": "left", "window": (0.5, 1.5)}, r"window: must be .* got \(0.5, 1.5\)"),
        ({"direction": "left", "window": "all"}, "window: must be two shares .* got 'all'"),
        ({"direction": "left", "drag_window": (0.5, 0.4, 0.1)}, "drag_window: must be left out"),
        (
            {"points": [((1, 1), (2, 2))], "drag_window": (0.4, 0.5, 0.1)},
            "drag_window: must be three shares of the steps that remain",
        ),
        ({"points": [((1, 1), (2, 2))], "window": (0, 1)}, "window: must be left out here"),
        ({"points": [(1, 1, 2, 2)]}, r"points: must be a list of \(\(x0, y0\), \(x1, y1\)\) in"),
        ({"points": [((1, 1), (2, math.nan))]}, "points: must be finite"),
        ({"points": [((1, 1), (10**400, 2))]}, "points: must be finite, got a coordinate beyond"),
        ({"direction": "left", "weight": 10**400}, "weight: must be a number of at least 0, got 1"),
        (
            {"direction": "left", "metric": "cosine", "speed": 0},
            "metric: must be 'mse' where stillness is wanted, .* got 'cosine' with speed=0",
        ),
        (
            {"regions": [kq.MoftRegion(half(), direction="up", speed=0.0)], "metric": "cosine"},
            "metric: must be 'mse' where stillness is wanted, .* with speed=0",
        ),
        (
            {"points": [((1, 1), (2, 2)), ((4, 4), (4, 4))], "metric": "cosine"},
            "metric: must be 'mse' where stillness is wanted, .* with a drag to its own start",
        ),
        (
            {"points": [((1, 1), (2, 2))], "speed": 2.0},
            "speed: must be left out here, since points say how far they go",
        ),
        ({"direction": "left", "iterations": -1}, "iterations: must be a whole number of at leas"),
        ({"direction": "left", "iterations": 1.5}, "iterations: must be a whole .* got 1.5"),
        ({"direction": "left", "step_size": math.inf}, "step_size: must be a number of at least 0"),
        ({"direction": "left", "weight": -1.0}, "weight: must be a number of at least 0, got -1"),
        ({"direction": "left", "loss": "mean"}, "loss: must be 'curve' or 'position', got 'mean'"),
        ({"direction": "left", "metric": "l1"}, "metric: must be 'mse' or 'cosine', got 'l1'"),
        ({"direction": "left", "share": 0}, "share: must be a number above 0 and at most 1, got 0"),
        ({"direction": "left", "feature": "motion"}, "feature: must be 'moft' or 'content_removed"),
        ({"direction": "left", "feature": "raw"}, "feature: must be left out here, since raw feat"),
        ({"points": [((1, 1), (2, 2))], "feature": "raw"}, "feature: must be left out here"),
        ({"direction": "left", "guided_frames": 0}, "guided_frames: must be a whole number of at"),
        ({"direction": "left", "shared_keys_values": 1}, "shared_keys_values: must be True or Fal"),
        ({"direction": "left", "tap": 3}, "tap: must be the name of a block, got int"),
        ({"direction": "left", "recompute": "yes"}, "recompute: must be 'auto', True or False"),
        ({"direction": "left", "reference_region": half()}, "reference_region: must be left out w"),
        (
            {"reference": REFERENCE, "reference_region": half(), "loss": "position"},
            "reference_region: must be left out here, since loss='position' compares equal places",
        ),
        ({"regions": [half()]}, "regions: must be MoftRegion, got ndarray"),
        (
            {"regions": [kq.MoftRegion(half(), direction="up")], "region": half()},
            "region: must be left out here, since regions have masks of their own",
        ),
        (
            {"regions": [kq.MoftRegion(half(), direction="up")], "speed": 2.0},
            "speed: must be left out here, since regions have speeds of their own",
        ),
    ],
)
def test_says_what_is_wrong_with_what_is_asked(options, message):
    with pytest.raises(kq.RequestError, match=message):
        kq.MoftGuidance(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "regions: each must have a motion, a reference or a direction, got neither"),
        (
            {"direction": "up", "reference": REFERENCE},
            "regions: each must have a motion, .* got both",
        ),
        ({"mask": None, "direction": "up"}, "regions: each must have a mask, got None"),
        ({"mask": "left", "direction": "up"}, "region: must be an array of numbers, got str"),
    ],
)
def test_says_what_is_wrong_with_a_region(options, message):
    with pytest.raises(kq.RequestError, match=message):
        kq.MoftRegion(**({"mask": half()} | options))


EMPTY = np.zeros((SIDE, SIDE))


@pytest.mark.parametrize(
    ("options", "how", "message"),
    [
        (
            {"region": np.ones((8, 16))},
            {},
            r"region: must be \[height, width\] = \[16, 16\] of the clip, got \[8, 16\]",
        ),
        ({"region": EMPTY}, {}, "region: must hold at least one place, got an empty one"),
        ({"region": 2 * half()}, {}, "region: must hold numbers from 0 to 1, got others"),
        (
            {"direction": None, "regions": [kq.MoftRegion(EMPTY, direction="up")]},
            {},
            "regions: mask 1 of 1: must hold at least one place",
        ),
        (
            {"direction": None, "reference": REFERENCE, "reference_region": np.ones((4, 4))},
            {},
            r"reference_region: must be \[height, width\] = \[16, 16\]",
        ),
        (
            {"direction": None, "points": [((1, 1), (16, 2))]},
            {},
            r"points: must be inside the frame, x from 0 to below 16 .* got \(16, 2\)",
        ),
        ({"direction": None, "points": [((1, -0.5), (1, 2))]}, {}, r"got \(1, -0.5\)"),
        (
            {
                "direction": None,
                "points": [((1, 1), (1, 9)), ((14, 1), (14, 9))],
                "region": half(),
            },
            {},
            "region: must hold places that are nearer to each drag",
        ),
        (
            {"direction": None, "points": [((14, 1), (14, 9))], "region": half()},
            {},
            r"region: must hold places within an eighth of the width of each drag's line, .*\(14.0, 1.0\)",
        ),
        (
            {
                "direction": None,
                "regions": [
                    kq.MoftRegion(half(), direction="up"),
                    kq.MoftRegion(np.ones((4, 4)), direction="up"),
                ],
            },
            {},
            r"regions: mask 2 of 2: must be \[height, width\]",
        ),
        (
            {"window": (0.0, 0.1)},
            {"steps": 3},
            r"window: \(0.0, 0.1\) of 3 steps must hold a step, got none; widen the window",
        ),
        ({}, {"frames": 1}, "frames: must be at least 2 where a motion is given, got 1"),
        (
            {"shared_keys_values": True},
            {},
            "shared_keys_values: the tap's block must have spatial self-attention, and up_blocks.1",
        ),
    ],
)
def test_says_what_does_not_fit_the_clip(options, how, message):
    with pytest.raises(kq.RequestError, match=message):
        resolve(own_keys(**({"direction": "left"} | options)), **how)


def test_an_unknown_tap_and_two_guidances_are_refused(engine):
    with pytest.raises(kq.RequestError, match=r"tap: must be a block .* got 'up_blocks.7'"):
        latents_of(engine, kq.MoftGuidance(direction="left", tap="up_blocks.7"))
    two = [kq.MoftGuidance(direction="left"), kq.MoftGuidance(direction="up")]
    with pytest.raises(kq.RequestError, match=r"at most one MoftGuidance .* regions of one"):
        latents_of(engine, two)


def test_another_back_end_cannot_recompute(engine, monkeypatch):
    other = SimpleNamespace(sites=engine.denoiser.sites, family=engine.denoiser.family, multiple=1)
    monkeypatch.setattr(engine, "denoiser", other)
    with pytest.raises(kq.RequestError, match="recompute: the back end must be eager, got Simple"):
        engine.resolve(request(kq.MoftGuidance(direction="left", recompute=True)))


# Given keys and values.


def test_rows_are_given_keys_and_values_by_slot(engine):
    """A row's own, given back, change nothing; another's are another result; 0 is untouched."""
    denoiser = engine.denoiser
    text = encode_prompts(engine.checkpoint, ["a ring", "a red circle"])
    latents, t = random(2, 4, FRAMES, 8, 8), torch.full((2,), 501.0)
    sites = [n for n, site in enumerate(denoiser.sites) if site.kind is SiteKind.SPATIAL]
    with denoiser.keeping(sites, torch.tensor([1, 0])) as kept:
        plain = denoiser.predict(latents, t, text)
    assert set(kept) == set(sites)

    def given(*slot):
        control = KeyValueControl(torch.tensor(slot), kept)
        return denoiser.predict(latents, t, text, ControlTensors(key_value=control))

    assert torch.equal(given(0, 0), plain)
    assert torch.equal(given(2, 1), plain)
    swapped = given(0, 2)
    assert torch.equal(swapped[0], plain[0])
    assert (swapped[1] - plain[1]).abs().max() > 0.1 * plain.abs().max()
    assert torch.equal(denoiser.predict(latents, t, text), plain)  # nothing is left behind
    assert isinstance(kept[sites[0]], KeyValueBank)


def test_warns_of_nothing(engine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents_of(engine, kq.MoftGuidance(points=[((2, 2), (9, 9))]))
