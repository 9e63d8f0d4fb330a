"""Motion embeddings on tiny networks with random weights, against the plain way of doing it."""

from contextlib import ExitStack, contextmanager

import attrs
import pytest
import torch
from stock import load_stock, predict_stock, record_projections, replaced_projections

import kinetiq as kq
from kinetiq import engine as engine_module
from kinetiq import generation
from kinetiq.control_tensors import ControlTensors, LoraControl, MotionControl
from kinetiq.errors import CheckpointError
from kinetiq.families import SiteKind
from kinetiq.motion_embedding import (
    MotionEmbedding,
    debias,
    make_banks,
    project_bank,
    resolve_motion_embedding,
    site_size,
)
from kinetiq.motion_file import MotionInfo
from kinetiq.motion_lora import make_lora_banks
from kinetiq.rows import join_loras, join_motions
from kinetiq.skips import list_skips
from kinetiq.text import encode_prompts

TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32
STEPS = 3


def assert_equal(got, wanted):
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def temporal_sites(engine):
    return [site for site in engine.denoiser.sites if site.kind is SiteKind.TEMPORAL]


def learn(engine, seed=0, shape=(4, 8, 8), size=1.0, **switches):
    """A motion of random tensors at all temporal sites, as large as what they are added to."""
    rng = torch.Generator().manual_seed(seed)
    frames, height, width = shape
    query_key, value = {}, {}
    for site in temporal_sites(engine):
        block = site.name.rpartition(".")[0]
        if block not in query_key:
            query_key[block] = size * torch.randn(frames, site.width, generator=rng)
        grid = site_size(engine.checkpoint.unet, site.name, (height, width))
        value[site.name] = size * torch.randn(frames, *grid, site.width, generator=rng)
    noise = torch.randn(4, *shape, generator=rng)
    info = MotionInfo(
        kind="embedding",
        family=engine.family.name,
        frames=frames,
        height=height,
        width=width,
        checkpoint="tiny",
        prompt="a ring",
    )
    switches = {"noise_prior": 0.0} | switches
    return MotionEmbedding(query_key=query_key, value=value, noise=noise, info=info, **switches)


def latents_of(engine, control=None, **options):
    options = {"seed": 3, "frames": 4, "steps": STEPS, "guidance_scale": 3.0} | options
    return next(engine.generate_latents([kq.Request("a red circle", control, **options)]))


def banks_of(engine, motion, shape=(4, 8, 8), raw=False):
    resolved = resolve_motion_embedding(
        motion, engine.checkpoint.unet, engine.family, engine.denoiser.sites, shape, STEPS
    )
    return resolved.raw() if raw else resolved.banks


@contextmanager
def added(network, engine, motion, rows):
    """Add a motion to what stock modules project, in the marked `rows` of the batch."""

    def before(embedding, tokens):  # [frames, C] or [frames, tokens, C] -> [rows * tokens, ...]
        if embedding.ndim == 2:
            embedding = embedding[:, None].expand(-1, tokens, -1)
        per_row = embedding.transpose(0, 1) * motion.scale
        return torch.cat([per_row * row for row in rows])

    def hook(embedding):
        def change(_, given):
            tokens = given[0].shape[0] // len(rows)
            return (given[0] + before(embedding, tokens), *given[1:])

        return change

    with ExitStack() as stack:
        for site in temporal_sites(engine):
            block = site.name.rpartition(".")[0]
            value = plain_debias(motion.value_scale * motion.value[site.name], motion.debias)
            embeddings = {"to_q": motion.query_key[block], "to_k": motion.query_key[block]}
            if value is not None:
                embeddings["to_v"] = value.flatten(1, 2)
            for name, embedding in embeddings.items():
                module = network.get_submodule(f"{site.name}.{name}")
                stack.callback(module.register_forward_pre_hook(hook(embedding)).remove)
        yield


def plain_debias(value, mode):
    if mode == "drop":
        return None
    frames = list(value)
    if mode == "difference":
        frames = [frames[0]] + [frames[j] - frames[j - 1] for j in range(1, len(frames))]
    elif mode == "mean":
        frames = [frame - sum(frames) / len(frames) for frame in frames]
    return torch.stack(frames)


def plain_sampling(
    engine, family, folder, motion, steps=STEPS, halves="both", injections=(), change=None
):
    """Sample with hooks on stock modules: embeddings before, injections behind the projections."""
    pipeline = load_stock(folder, family)
    network, scheduler = pipeline.unet.requires_grad_(False), pipeline.scheduler
    if change is not None:
        change(network)
    request = kq.Request("x", list(injections) or None, frames=4, steps=STEPS)
    controls = engine.resolve(request).controls
    silent, positive = encode_prompts(pipeline, ["", "a red circle"])
    names = [f"{s.name}.{p}" for s in temporal_sites(engine) for p in ("to_q", "to_k", "to_v")]
    scheduler.set_timesteps(STEPS)
    sample = torch.randn((1, 4, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    if motion.noise_prior:
        share, noise = motion.noise_prior, motion.noise / motion.noise.std(correction=0)
        sample = share**0.5 * noise + (1 - share) ** 0.5 * sample
    for step, t in enumerate(scheduler.timesteps):
        both, text = sample.repeat(2, 1, 1, 1, 1), torch.stack([silent, positive])
        seen = {}
        if injections:
            source = (controls.motion or controls.query).source
            share = scheduler.alphas_cumprod[t]
            noised = share.sqrt() * source.latents + (1 - share).sqrt() * source.noise(float(t))
            seen = record_projections(
                network,
                names,
                lambda noised=noised, t=t: predict_stock(
                    network, family, noised[None], t, silent[None]
                ),
            )

        def inject(name, out, seen=seen):  # [rows * positions, frames, channels]
            other = seen[name].repeat(2, 1, 1)
            if controls.motion is not None:
                moved = out.mean(1, keepdim=True) + other - other.mean(1, keepdim=True)
                out = torch.lerp(out, moved, controls.motion.blend)
            if controls.query is not None and name.endswith("to_q"):
                if controls.query.reduced:
                    other = out.mean(1, keepdim=True) + other - other.mean(1, keepdim=True)
                out = torch.lerp(out, other, controls.query.blend)
            return out

        with ExitStack() as stack:
            if step < steps:
                rows = (1.0 if halves == "both" else 0.0, 1.0)
                stack.enter_context(added(network, engine, motion, rows))
            stack.enter_context(replaced_projections(network, names if seen else [], inject))
            uncond, cond = predict_stock(network, family, both, t, text)
        sample = scheduler.step(uncond + 3.0 * (cond - uncond), t, sample[0]).prev_sample[None]
    return sample[0]


@pytest.mark.parametrize(
    ("switches", "steps"),
    [
        ({"debias": "difference"}, STEPS),
        ({"debias": "none", "scale": -0.5, "value_scale": 0.3}, STEPS),
        ({"debias": "mean", "until": 0.4, "halves": "cond"}, 1),
        ({"debias": "drop", "noise_prior": 0.3}, STEPS),
    ],
)
def test_equals_the_plain_way_by_hooks_on_stock_modules(
    engine, family, tiny_folder, switches, steps
):
    motion = learn(engine, **switches)
    folder = tiny_folder(family)
    wanted = plain_sampling(engine, family, folder, motion, steps, motion.halves)
    got = latents_of(engine, motion)
    assert_equal(got, wanted)
    assert (got - latents_of(engine)).abs().max() > 0.05 * wanted.abs().max()  # it does something


@pytest.mark.parametrize(
    "options",
    [
        [("MotionInjection", {"blend": 0.5})],
        [("QueryInjection", {"sites": "temporal", "until": 1.0, "alpha": 0.6})],
        [
            ("MotionInjection", {"blend": 0.5}),
            (
                "QueryInjection",
                {"sites": "temporal", "until": 1.0, "alpha": 0.6, "reduce_leak": True},
            ),
        ],
    ],
)
def test_composes_with_injections(engine, family, tiny_folder, reference, options):
    """The embedding first, then deviations, then queries; the source row has no embedding."""
    motion = learn(engine)
    injections = [getattr(kq, name)(reference, **switches) for name, switches in options]
    wanted = plain_sampling(engine, family, tiny_folder(family), motion, injections=injections)
    got = latents_of(engine, [motion, *injections])
    assert_equal(got, wanted)
    assert (got - latents_of(engine, injections)).abs().max() > 0.02 * wanted.abs().max()


def adapt(engine, **switches):
    """A LoRA of random matrices on half of the projections, k and v among them."""
    rng = torch.Generator().manual_seed(9)
    down, up = {}, {}
    for number, site in enumerate(temporal_sites(engine)):
        for name in ("to_k", "to_v") if number % 2 else ():
            path = f"{site.name}.{name}"
            down[path] = torch.randn(2, site.width, generator=rng) / site.width**0.5
            up[path] = torch.randn(site.width, 2, generator=rng) / 2
    info = attrs.evolve(learn(engine).info, kind="lora")
    return kq.MotionLora(down, up, info=info, noise=learn(engine, 7).noise, **switches)


def test_composes_with_a_lora_whose_change_it_goes_through(engine, family, tiny_folder):
    motion, lora = learn(engine), adapt(engine, noise_prior=0.0)

    def merge(network):
        for path, down in lora.down.items():
            network.get_submodule(path).weight += lora.up[path] @ down

    wanted = plain_sampling(engine, family, tiny_folder(family), motion, change=merge)
    got = latents_of(engine, [motion, lora])
    assert_equal(got, wanted)
    assert (got - latents_of(engine, motion)).abs().max() > 0.02 * wanted.abs().max()


def test_the_embedding_itself_is_there_only_where_a_lora_of_the_batch_is(engine, monkeypatch):
    seen, predict = [], engine.denoiser.predict

    def watch(latents, timesteps, text, controls):
        if controls.motion is not None:
            banks = controls.motion.banks.values()
            seen.append({bank.query_key is not None and bank.value is not None for bank in banks})
            assert all(bank.projected_query is not None for bank in banks)
        return predict(latents, timesteps, text, controls)

    monkeypatch.setattr(engine.denoiser, "predict", watch)
    motion, lora = learn(engine), adapt(engine, noise_prior=0.0)
    for controls, raw in (((motion,), False), (([motion, lora],), True), ((motion, lora), True)):
        requests = [kq.Request("a", control, frames=4, steps=1) for control in controls]
        list(engine.generate_latents(requests))
        assert seen.pop() == {raw} and not seen


def test_projections_alone_are_refused_where_a_lora_changes_them(engine):
    resolved = engine.resolve(
        kq.Request("x", [learn(engine), adapt(engine, noise_prior=0.0)], frames=4)
    )
    embedding, lora = resolved.controls.embedding, resolved.controls.lora
    one = torch.ones(1)
    controls = ControlTensors(
        motion=MotionControl(one.long(), one, join_motions((embedding,))),
        lora=LoraControl(one.long(), one, join_loras((lora,))),
    )
    given = torch.zeros(1, 4, 4, 8, 8), torch.tensor([1.0]), torch.zeros(1, 24, 16)
    with torch.no_grad(), pytest.raises(kq.RequestError, match="got projections alone at site"):
        engine.denoiser.predict(*given, controls)


def test_one_motion_alone_brings_its_noise(engine):
    motion, lora = learn(engine, noise_prior=0.5), adapt(engine, noise_prior=0.2)
    with pytest.raises(kq.RequestError, match="noise_prior: one control alone may bring its noise"):
        latents_of(engine, [motion, lora])
    first = [attrs.evolve(motion, noise_prior=0.0), lora]
    second = [motion, attrs.evolve(lora, noise_prior=0.0)]
    for controls, owner, share in ((first, lora, 0.2), (second, motion, 0.5)):
        noise = engine.resolve(kq.Request("x", controls, frames=4)).controls.noise
        assert noise.share == share
        assert_equal(noise.noise, owner.noise / owner.noise.std(correction=0))


def test_zero_changes_no_bit(engine):
    plain = latents_of(engine)
    assert torch.equal(latents_of(engine, learn(engine, size=0.0)), plain)
    assert torch.equal(latents_of(engine, learn(engine, scale=0.0)), plain)
    assert torch.equal(latents_of(engine, learn(engine, until=0.0, noise_prior=1.0)), plain)


def test_clips_of_one_batch_have_their_own_motions(engine):
    motions = [
        learn(engine, 0),
        learn(engine, 1, scale=-1.0),
        None,
        learn(engine, 2, until=0.4, halves="cond"),
        learn(engine, 1, scale=0.5),  # the slot of another clip, at its own scale
        learn(engine, 3, shape=(6, 12, 8), debias="mean", noise_prior=0.5),
    ]
    requests = [
        kq.Request("a ring", motion, seed=seed, frames=4, steps=STEPS + seed % 2)
        for seed, motion in enumerate(motions)
    ]
    requests[4] = attrs.evolve(requests[4], guidance_scale=1.0)
    together = list(engine.generate_latents(requests, max_clips=len(requests)))
    for request, got in zip(requests, together, strict=True):
        assert_equal(got, next(engine.generate_latents([request])))


def test_rows_of_slot_0_are_not_touched_by_a_bit(engine):
    plain = kq.Request("a ring", seed=1, frames=4, steps=STEPS)
    beside = kq.Request("a cross", seed=2, frames=4, steps=STEPS)
    moved = attrs.evolve(beside, control=learn(engine))
    alone, _ = engine.generate_latents([plain, beside])
    together, other = engine.generate_latents([plain, moved])
    assert torch.equal(together, alone)
    assert not torch.equal(other, next(engine.generate_latents([beside])))


def test_banks_are_made_once_a_motion_and_size(engine, monkeypatch):
    made = []

    def spy(asked, *rest):
        made.append((asked.control, asked.shape))
        return make_banks(asked, *rest)

    monkeypatch.setattr(engine_module, "make_banks", spy)
    motion, other = learn(engine), learn(engine, 1)
    controls = [motion, attrs.evolve(motion, scale=2.0, until=0.5), other, motion]
    requests = [kq.Request("a ring", control, frames=4, steps=1) for control in controls]
    requests.append(kq.Request("a ring", motion, frames=6, steps=1))
    assert len(list(engine.generate_latents(requests))) == 5
    assert [shape for _, shape in made] == [(4, 8, 8), (4, 8, 8), (6, 8, 8)]
    assert made[1][0] is other


def test_a_lora_is_brought_to_the_network_once(engine, monkeypatch):
    made, listed = [], []

    def spy(asked, *rest):
        made.append(asked.control)
        return make_lora_banks(asked, *rest)

    def spy_skips(*given):
        listed.append(given)
        return list_skips(*given)

    monkeypatch.setattr(engine_module, "make_lora_banks", spy)
    monkeypatch.setattr(engine_module, "list_skips", spy_skips)
    lora = adapt(engine, noise_prior=0.0)
    other = 2.0 * lora
    controls = [lora, attrs.evolve(lora, scale=2.0, highway="all"), other, lora]
    requests = [kq.Request("a ring", control, frames=4, steps=1) for control in controls]
    requests.append(kq.Request("a ring", lora, frames=6, steps=1))
    assert len(list(engine.generate_latents(requests))) == 5
    assert made == [lora, other]
    assert len(listed) == 1


def test_too_little_memory_for_a_lora_is_said(engine, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine_module, "make_lora_banks", full)
    with pytest.raises(kq.WorkError, match="the matrices of a LoRA must fit in memory"):
        latents_of(engine, adapt(engine))


def test_a_motion_without_noise_prior_starts_from_the_seed_and_with_all_of_it_from_its_own(engine):
    motion = learn(engine, scale=0.0)
    plain = [latents_of(engine, seed=seed) for seed in (1, 2)]
    noise_only = attrs.evolve(motion, noise_prior=1.0)
    ours = [latents_of(engine, noise_only, seed=seed) for seed in (1, 2)]
    assert torch.equal(ours[0], ours[1])
    assert not torch.equal(ours[0], plain[0])
    assert torch.equal(latents_of(engine, motion, seed=1), plain[0])


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_the_noise_is_blended_at_unit_variance_and_scaled_like_the_seeds(
    engine, monkeypatch, sampler
):
    starts = []

    def spy(sample, *rest):
        starts.append(sample[0])
        return step(sample, *rest)

    step = generation.guided_step
    monkeypatch.setattr(generation, "guided_step", spy)
    motion = 3.0 * learn(engine, noise_prior=0.25)  # its noise now weighs 3 in sums
    latents_of(engine, motion, steps=1, sampler=sampler)
    latents_of(engine, steps=1, sampler=sampler)
    unit = motion.noise / motion.noise.std(correction=0)
    scale = engine.resolve(kq.Request("x", steps=1, sampler=sampler)).sampler.initial_scale
    wanted = scale * 0.5 * unit + 0.75**0.5 * starts[1]
    assert_equal(starts[0], wanted)


def test_sizes_of_sites_are_those_of_the_network(engine):
    """At a size whose halves are odd, so that rounding up shows."""
    seen = {}

    def keep(name):
        def record(_, given):
            seen[name] = tuple(given[0].shape[-2:])

        return record

    network = engine.checkpoint.unet
    folders = {site.name.partition(".transformer_blocks")[0] for site in temporal_sites(engine)}
    handles = [
        network.get_submodule(name).register_forward_pre_hook(keep(name)) for name in folders
    ]
    text = torch.zeros(1, 24, 16)
    with torch.no_grad():
        engine.denoiser.predict(torch.zeros(1, 4, 2, 10, 14), torch.tensor([1.0]), text)
    for handle in handles:
        handle.remove()
    assert seen == {name: site_size(network, name, (10, 14)) for name in folders}
    assert len(set(seen.values())) == 3  # 10x14, 5x7, 3x4


def test_a_projected_bank_is_what_the_projections_add(engine):
    """W(x + m) + b - (W x + b), differentiable, and of each part by its own projection."""
    attention = engine.checkpoint.unet.get_submodule(temporal_sites(engine)[0].name)
    rng = torch.Generator().manual_seed(0)
    width = attention.to_q.in_features
    query_key = torch.randn(2, 4, width, generator=rng).requires_grad_()
    value = torch.randn(2, 4, 6, width, generator=rng).requires_grad_()
    bank = project_bank(attention, query_key, value)
    given = torch.randn(2, 4, 6, width, generator=rng)
    pairs = [
        (bank.projected_query[:, :, None], attention.to_q, query_key[:, :, None]),
        (bank.projected_key[:, :, None], attention.to_k, query_key[:, :, None]),
        (bank.projected_value, attention.to_v, value),
    ]
    for projected, linear, embedding in pairs:
        wanted = linear(given + embedding) - linear(given)
        assert_equal(projected.expand_as(wanted), wanted)
    assert bank.query_key is bank.value is None  # the embedding itself is made where it is wanted
    sum(p.square().sum() for p, _, _ in pairs).backward()
    assert query_key.grad.abs().min() > 0 and value.grad.abs().min() > 0
    none = project_bank(attention, None, value)
    assert none.projected_query is none.projected_key is None
    assert torch.equal(none.projected_value, bank.projected_value)


def test_debias():
    value = torch.tensor([[1.0, 2.0], [4.0, 0.0], [5.0, -3.0]])
    assert debias(value, "difference").tolist() == [[1, 2], [3, -2], [1, -3]]
    assert debias(value, "mean").sum(0).abs().max() <= 1e-6
    assert torch.equal(debias(value, "mean")[2] - debias(value, "mean")[0], value[2] - value[0])
    assert debias(value, "none") is value
    assert debias(value, "drop") is None
    with pytest.raises(
        kq.RequestError, match="debias: must be one of difference, none, mean, drop"
    ):
        debias(value, "sum")


def interpolate(values, count):
    """Linear interpolation along the first axis between samples at (i + 1/2) / n, by hand."""
    old = len(values)
    out = []
    for index in range(count):
        place = min(max((index + 0.5) * old / count - 0.5, 0.0), old - 1)
        low = int(place)
        high = min(low + 1, old - 1)
        out.append(values[low] + (place - low) * (values[high] - values[low]))
    return torch.stack(out)


@pytest.mark.parametrize("shape", [(7, 8, 8), (3, 12, 20), (4, 4, 10)])
def test_another_size_is_interpolated_and_the_difference_taken_behind(engine, shape):
    motion = learn(engine, debias="difference")
    banks = banks_of(engine, motion, shape, raw=True)
    names = [site.name for site in engine.denoiser.sites]
    for index, bank in banks.items():
        name = names[index]
        query_key = motion.query_key[name.rpartition(".")[0]]
        torch.testing.assert_close(bank.query_key[0], interpolate(query_key, shape[0]))
        height, width = site_size(engine.checkpoint.unet, name, shape[1:])
        value = interpolate(motion.value[name], shape[0])  # [frames, h, w, C]
        value = interpolate(value.transpose(0, 1), height).transpose(0, 1)
        value = interpolate(value.transpose(0, 2), width).transpose(0, 2)
        wanted = plain_debias(value, "difference").flatten(1, 2)
        torch.testing.assert_close(bank.value[0], wanted, rtol=1e-4, atol=1e-5)
    assert len(banks) == len(temporal_sites(engine))
    assert latents_of(engine, motion, frames=shape[0], steps=1).shape[1] == shape[0]


def test_resampling_and_resizing_first_is_the_same(engine):
    motion = learn(engine, noise_prior=0.5)
    brought = motion.resample(frames=6).resize(height=16, width=12)
    assert brought.info.shape == (6, 16, 12) and brought.noise.shape == (4, 6, 16, 12)
    options = {"frames": 6, "height": 32, "width": 24}
    banks = banks_of(engine, motion, (6, 16, 12), raw=True)
    for index, bank in banks_of(engine, brought, (6, 16, 12), raw=True).items():
        torch.testing.assert_close(bank.value, banks[index].value)
    resolved = engine.resolve(kq.Request("x", brought, **options)).controls.noise
    direct = engine.resolve(kq.Request("x", motion, **options)).controls.noise
    assert abs(float(direct.noise.std()) - 1.0) <= 1e-3
    # Frames and size in one go or one after the other: interpolation is separable.
    torch.testing.assert_close(resolved.noise, direct.noise, rtol=1e-4, atol=1e-4)
    assert motion.resample(frames=4) is motion and motion.resize(height=8, width=8) is motion


def parts_of(banks):
    return [
        part
        for _, bank in sorted(banks.items())
        for part in (bank.projected_query, bank.projected_key, bank.projected_value)
    ]


@pytest.mark.parametrize("mode", ["difference", "none", "mean"])
def test_arithmetic_is_linear_in_the_banks(engine, mode):
    one, two = learn(engine, 1, debias=mode), learn(engine, 2, debias=mode, scale=0.5)
    two = attrs.evolve(two, value_scale=-2.0)
    ones, twos = (parts_of(banks_of(engine, motion)) for motion in (one, two))
    for got, wanted in [
        (-0.3 * one, [-0.3 * a for a in ones]),
        (one * 2, [2 * a for a in ones]),
        (-one, [-a for a in ones]),
        (one + two, [a + 0.5 * b for a, b in zip(ones, twos, strict=True)]),
        (2.0 * one - two, [2 * a - 0.5 * b for a, b in zip(ones, twos, strict=True)]),
    ]:
        for part, expected in zip(parts_of(banks_of(engine, got)), wanted, strict=True):
            assert_equal(part, expected)
    assert (one + two).scale == (one + two).value_scale == 1.0
    assert attrs.evolve(-one, scale=-1.0) != one  # equal in effect, and told apart


def test_a_sum_has_the_sites_of_both(engine):
    motion = learn(engine)
    first, *rest = motion.query_key
    one = attrs.evolve(motion, query_key={first: motion.query_key[first]}, value={})
    two = attrs.evolve(motion, query_key={name: motion.query_key[name] for name in rest})
    both = one + two
    assert both.query_key.keys() == motion.query_key.keys()
    assert all(torch.equal(both.query_key[n], motion.query_key[n]) for n in motion.query_key)
    assert all(torch.equal(both.value[n], motion.value[n]) for n in motion.value)


@pytest.mark.parametrize("make", [learn, adapt])
def test_a_reversed_motion_brings_no_noise_however_it_is_reversed(engine, make):
    forward = make(engine, noise_prior=None)

    def brought(motion):
        return engine.resolve(kq.Request("x", motion, frames=4)).controls.noise

    back = attrs.evolve(forward, scale=-0.5)
    assert brought(back) is brought(-forward) is brought(2.0 * back) is brought(back + back) is None
    assert torch.equal((back + forward).noise, forward.noise)
    for scale in (0.0, 1.0):  # 0 is what the noise does alone
        assert brought(attrs.evolve(forward, scale=scale)).share == forward.noise_share > 0


@pytest.mark.parametrize("make", [learn, adapt])
def test_a_share_of_noise_that_cannot_be_taken_is_refused(engine, make):
    forward = make(engine, noise_prior=0.7)
    with pytest.raises(
        kq.RequestError, match=r"noise_prior: must be .* scale is negative, got 0\.7"
    ):
        attrs.evolve(forward, scale=-1.0)
    with pytest.raises(kq.RequestError, match=r"noise_prior: must be .* has no noise .* got 0\.7"):
        attrs.evolve(forward, noise=None)
    back = -forward  # what was chosen goes with the noise
    assert back.noise_prior is None
    assert (back + forward).noise_prior == (forward + back).noise_prior == 0.7
    assert attrs.evolve(back, noise_prior=0.0).noise_share == 0
    with pytest.raises(kq.RequestError, match=r"same noise_prior, got 0\.7 and 0\.1"):
        forward + attrs.evolve(forward, noise_prior=0.1)


def test_a_negative_value_scale_reverses_one_part_and_keeps_the_noise(engine):
    motion = learn(engine, noise_prior=0.5)
    turned = attrs.evolve(motion, value_scale=-1.0)
    assert turned.noise_share == 0.5
    for site, bank in banks_of(engine, turned).items():
        plain = banks_of(engine, motion)[site]
        assert torch.equal(bank.projected_value, -plain.projected_value)
        assert torch.equal(bank.projected_query, plain.projected_query)


def test_noise_under_arithmetic(engine):
    one, two = learn(engine, 1), learn(engine, 2)
    assert (-one).noise is None and (0.0 * one).noise is None
    assert torch.equal((one - two).noise, one.noise)
    assert (-one - two).noise is None
    third = attrs.evolve(one, noise=None)
    assert torch.equal((third + two).noise, two.noise)
    weighted = attrs.evolve(0.9 * one + 0.1 * two, noise_prior=1.0)
    noise = engine.resolve(kq.Request("x", weighted, frames=4)).controls.noise.noise
    wanted = 0.9 * one.noise + 0.1 * two.noise
    assert_equal(noise, wanted / wanted.std(correction=0))
    assert abs(float(noise.std(correction=0)) - 1.0) <= 1e-5


def test_a_file_gives_the_motion_back(engine, tmp_path):
    motion = learn(engine, value_scale=2.0)
    path = tmp_path / "dance.safetensors"
    motion.write(path)
    assert MotionEmbedding.read(path) == motion
    blocks = sorted(motion.query_key)
    assert (motion.info.sites, motion.info.target, motion.info.rank) == (tuple(blocks), "", 0)
    again = MotionEmbedding.read(path, scale=2, debias="drop", until=0.5, halves="cond")
    assert (again.scale, again.debias, again.noise_prior) == (2, "drop", 0.0)
    assert again != motion and again.fingerprint == motion.fingerprint
    assert again.info == motion.info
    assert torch.equal(
        latents_of(engine, MotionEmbedding.read(path, noise_prior=0.0)), latents_of(engine, motion)
    )


def test_equal_motions_are_equal_and_cannot_change(engine):
    tensor = torch.ones(4, 8)
    info = learn(engine).info
    one = MotionEmbedding(query_key={"a": tensor}, info=info)
    two = MotionEmbedding(query_key={"a": tensor.clone().requires_grad_()}, info=info)
    assert one == two and hash(one) == hash(two)
    tensor += 1
    assert float(one.query_key["a"][0, 0]) == 1.0
    assert one != attrs.evolve(one, scale=2.0)
    assert one != MotionEmbedding(query_key={"a": tensor}, info=info)
    assert kq.Request("x", one) == kq.Request("x", two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: attrs.evolve(m, scale=float("nan")), "scale: must be a finite number, got nan"),
        (lambda m: attrs.evolve(m, debias="sum"), "debias: must be one of 'difference', 'none'"),
        (lambda m: attrs.evolve(m, noise_prior=1.5), "noise_prior: must be a number from 0 to 1"),
        (
            lambda m: attrs.evolve(m, debias="drop", value_scale=3.0),
            "value_scale: must be 1 or left out where debias is 'drop', got 3.0",
        ),
        (
            lambda m: attrs.evolve(m, value={}, value_scale=3.0),
            "value_scale: must be 1 or left out where the motion has no value part, got 3.0",
        ),
        (lambda m: attrs.evolve(m, until=-1), "until: must be a number from 0 to 1, got -1"),
        (lambda m: attrs.evolve(m, halves="one"), "halves: must be one of 'both', 'cond'"),
        (lambda m: attrs.evolve(m, query_key={}, value={}), "embedding of at least one site, got"),
        (lambda m: attrs.evolve(m, query_key=[1]), "must hold tensors by name, got list"),
        (
            lambda m: attrs.evolve(m, query_key={"a": torch.ones(5, 8)}),
            r"query_key\.a must be \[frames, channels\] for 4 frames of 8x8 latents, got \[5, 8\]",
        ),
        (
            lambda m: attrs.evolve(m, value={"a": torch.ones(4, 64, 8)}),
            r"value\.a must be \[frames, h, w, channels\] for 4 frames .* got \[4, 64, 8\]",
        ),
        (
            lambda m: attrs.evolve(m, noise=torch.ones(4, 4, 8, 4)),
            r"noise must be \[channels, frames, h, w\] for 4 frames of 8x8 latents",
        ),
        (
            lambda m: attrs.evolve(m, query_key={"a": torch.full((4, 8), torch.inf)}),
            r"query_key\.a must be finite, got NaN or infinity",
        ),
        (lambda m: m * float("inf"), "a factor must be finite, got inf"),
        (lambda m: m + m.resample(frames=6), r"use m\.resample\(frames=4\) on the second"),
        (lambda m: m + m.resize(height=4, width=8), r"use m\.resize\(height=8, width=8\) on the"),
        (lambda m: m + attrs.evolve(m, debias="none"), "must have the same debias, got 'differen"),
        (lambda m: m.resample(frames=1), "a motion has at least 2 frames, got 4 to bring to 1"),
        (lambda m: m.resize(height=0, width=8), "a size must be at least 1x1, got 0x8"),
        (
            lambda m: attrs.evolve(m, value={"a": torch.ones(4, 3, 3, 8)}).resize(
                height=4, width=4
            ),
            "resize: the size of a must follow from that of the latents, got 3x3 in 8x8, which be",
        ),
        (
            lambda m: attrs.evolve(m, value={"a": torch.ones(4, 1, 1, 8)}, noise=None).resize(
                height=32, width=32
            ),
            "resize: the size of a must follow .* which becomes 1x1 or 2x2 or 4x4 in 32x32",
        ),
    ],
)
def test_says_what_is_wrong(engine, change, message):
    motion = learn(engine)
    with pytest.raises(kq.RequestError, match=message):
        change(motion)


def test_a_wrong_kind_of_term_is_a_type_error(engine):
    motion = learn(engine)
    for change in (lambda: motion + 1, lambda: motion - "a", lambda: motion * "a"):
        with pytest.raises(TypeError):
            change()


def test_a_file_of_something_else_is_refused(engine, tmp_path):
    from kinetiq.motion_file import write_motion

    motion, path = learn(engine), tmp_path / "a.safetensors"
    write_motion(path, {"up.a": torch.ones(2, 2)}, attrs.evolve(motion.info, kind="lora"))
    with pytest.raises(kq.CheckpointError, match=r"of kind 'embedding', got 'lora'; read it with"):
        MotionEmbedding.read(path)
    write_motion(path, {"up.a": torch.ones(2, 2)}, motion.info)
    with pytest.raises(kq.CheckpointError, match=r"named query_key, value, noise, got 'up\.a'"):
        MotionEmbedding.read(path)
    write_motion(path, {"query_key.a": torch.ones(2, 2)}, motion.info)
    with pytest.raises(kq.CheckpointError, match=r"read: .*a\.safetensors: .* got \[2, 2\]"):
        MotionEmbedding.read(path)
    motion.write(path)
    with pytest.raises(kq.RequestError, match=r"switches must be among scale, .* got 'size'"):
        MotionEmbedding.read(path, size=2)
    with pytest.raises(kq.RequestError, match=r"^until: must be a number from 0 to 1, got 2"):
        MotionEmbedding.read(path, until=2)


def test_a_motion_of_another_model_is_refused(engine, family):
    motion = learn(engine)
    other = {"animatediff": "unet3d", "unet3d": "animatediff"}[family]
    site = next(iter(motion.value))
    cases = [
        (
            attrs.evolve(motion, info=attrs.evolve(motion.info, family=other)),
            rf"the family of the network, {family}, got {other} \(tiny\); train it on this model",
        ),
        (
            attrs.evolve(motion, query_key={"up_blocks.9.x": torch.ones(4, 8)}),
            r"all its sites must be in the network, got up_blocks\.9\.x, which is not",
        ),
        (
            attrs.evolve(motion, value={site: torch.ones(4, 8, 8, 5)}),
            r"attn\d must be \d+ wide, as the network is, got 5",
        ),
        (
            attrs.evolve(motion, value={site: motion.value[site][:, :3]}),
            r"attn\d must be \dx\d where latents are 8x8, got 3x\d",
        ),
        (
            attrs.evolve(motion, noise=torch.randn(3, 4, 8, 8), noise_prior=0.5),
            "its noise must have 4 channels, as the latents have, got 3",
        ),
    ]
    for control, message in cases:
        with pytest.raises(kq.CheckpointError, match=message):
            latents_of(engine, control)


def test_what_does_not_compose_is_refused(engine):
    motion = learn(engine)
    with pytest.raises(kq.RequestError, match=r"at most one MotionEmbedding .* add them up: m1 \+"):
        latents_of(engine, [motion, learn(engine, 1)])
    with pytest.raises(kq.RequestError, match="frames: must be at least 2 where a motion is given"):
        latents_of(engine, motion, frames=1)


def test_one_bad_motion_does_not_stop_the_others(engine):
    bad = attrs.evolve(learn(engine), query_key={"nowhere": torch.ones(4, 8)}, value={})
    requests = [
        kq.Request("a ring", control, frames=4, steps=1) for control in (None, bad, learn(engine))
    ]
    first, second, third = engine.generate_many(requests, on_error="return")
    assert isinstance(second, kq.CheckpointError)
    assert first.num_frames == third.num_frames == 4


def test_parts_at_paths_of_the_other_part_are_refused(engine):
    """Nothing would look for them there, so they would be lost."""
    motion = learn(engine)
    site = temporal_sites(engine)[0].name
    block = site.rpartition(".")[0]
    query_key = {site: motion.query_key[block]}
    value = {block: motion.value[site]}
    for changes, words in (
        (
            {"query_key": query_key},
            rf"query_key must be named .* a transformer .* {block}, got {site}",
        ),
        ({"value": value}, rf"value must be named by the path of an attention, .*, got {block}$"),
    ):
        with pytest.raises(CheckpointError, match=rf"^motion: {words}"):
            latents_of(engine, attrs.evolve(motion, **changes))
