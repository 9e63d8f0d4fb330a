"""Query injection on tiny networks with random weights, against the plain way of doing it."""

import importlib

import numpy as np
import pytest
import torch
from stock import load_stock, predict_stock, record_projections, replaced_projections

import kinetiq as kq
from kinetiq import inversion
from kinetiq.control_tensors import ControlTensors, QueryControl, no_injection
from kinetiq.families import SiteKind
from kinetiq.text import encode_prompts

operator = importlib.import_module(
    "kinetiq.kernels.query_attention"
)  # not the function of that name

TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32


def latents_of(engine, control=None, **options):
    options = {"seed": 3, "frames": 4, "steps": 4, "guidance_scale": 3.0} | options
    return next(engine.generate_latents([kq.Request("a red circle", control, **options)]))


def plain_two_passes(engine, family, folder, control, until):
    """Record the source's queries at each step, then sample with them, by hooks on stock modules."""
    pipeline = load_stock(folder, family)
    network, scheduler = pipeline.unet.requires_grad_(False), pipeline.scheduler
    source = engine.resolve(kq.Request("x", control, frames=4, steps=4)).controls.query.source
    queries = [
        f"{site.name}.to_q"
        for site, chosen in zip(
            engine.denoiser.sites,
            engine.resolve(kq.Request("x", control, frames=4, steps=4)).controls.query.sites,
            strict=True,
        )
        if chosen
    ]
    negative, positive, silent = encode_prompts(pipeline, ["", "a red circle", ""])
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn((1, 4, 4, 8, 8), generator=generator)
    for step, t in enumerate(scheduler.timesteps):
        both = sample.repeat(2, 1, 1, 1, 1)
        text = torch.stack([negative, positive])

        def run(both=both, text=text, t=t):
            return predict_stock(network, family, both, t, text)

        if step < until:
            at = scheduler.timesteps[max(step, round(4 * control.source_from))]
            share = scheduler.alphas_cumprod[at]
            noised = share.sqrt() * source.latents + (1 - share).sqrt() * source.noise(float(at))
            seen = record_projections(
                network,
                queries,
                lambda noised=noised, at=at: predict_stock(
                    network, family, noised[None], at, silent[None]
                ),
            )
            with replaced_projections(
                network, queries, lambda name, _, seen=seen: seen[name].repeat(2, 1, 1)
            ):
                output = run()
        else:
            output = run()
        uncond, cond = output
        sample = scheduler.step(uncond + 3.0 * (cond - uncond), t, sample[0]).prev_sample[None]
    return sample[0]


@pytest.mark.parametrize(
    ("sites", "source_from"), [("spatial", 0.0), ("temporal", 0.0), ("both", 0.0), ("both", 0.25)]
)
def test_equals_the_plain_two_pass_way(engine, family, tiny_folder, reference, sites, source_from):
    control = kq.QueryInjection(reference, until=0.5, sites=sites, source_from=source_from)
    wanted = plain_two_passes(engine, family, tiny_folder(family), control, until=2)
    got = latents_of(engine, control)
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    assert (got - latents_of(engine)).abs().max() > 0.1 * wanted.abs().max()  # it does something


def test_until_zero_is_plain_generation_bit_for_bit(engine, reference):
    control = kq.QueryInjection(reference, until=0.0)
    assert torch.equal(latents_of(engine, control), latents_of(engine))


@pytest.mark.parametrize("alpha", [0.0, 1e-3])
def test_a_little_blend_changes_little(engine, reference, alpha):
    plain = latents_of(engine)
    got = latents_of(engine, kq.QueryInjection(reference, alpha=alpha))
    assert (got - plain).abs().max() <= (TOLERANCE + 10 * alpha) * plain.abs().max()


def test_queries_of_a_vanilla_pair_leave_the_result_bit_equal(engine):
    """cond reads the queries of cond, uncond those of uncond: of the same latents and prompts."""
    generator = torch.Generator().manual_seed(0)
    text = encode_prompts(engine.checkpoint, ["a red circle", "", "a red circle", ""])
    sites = len(engine.denoiser.sites)
    spatial = torch.tensor([site.kind is SiteKind.SPATIAL for site in engine.denoiser.sites])
    row = no_injection(sites, 4)
    row[spatial, 0], row[spatial, 1] = 2, 3
    injected = ControlTensors(query=QueryControl(row, torch.ones(4)))
    sample = torch.randn((4, 4, 8, 8), generator=generator)
    with torch.inference_mode():
        for t in (800.0, 500.0, 100.0):
            given = (sample.repeat(4, 1, 1, 1, 1), torch.full((4,), t), text)
            with_queries = engine.denoiser.predict(*given, injected)
            plain = engine.denoiser.predict(*given, ControlTensors())
            assert torch.equal(with_queries, plain)
            assert torch.equal(with_queries[:2], with_queries[2:])
            sample = sample - 0.3 * (with_queries[1] + 3.0 * (with_queries[0] - with_queries[1]))


def test_the_attention_sees_the_queries_of_the_source(engine, reference, monkeypatch):
    seen = []
    attend = operator._attend

    def spy(query, key, *others, **options):
        seen.append((query, key))
        return attend(query, key, *others, **options)

    monkeypatch.setattr(operator, "_attend", spy)
    latents_of(engine, kq.QueryInjection(reference, until=1.0), steps=1)
    spatial = [(q, k) for q, k in seen if q.shape == k.shape and q.shape[0] == 3 * 4]
    assert len(spatial) == sum(s.kind is SiteKind.SPATIAL for s in engine.denoiser.sites)
    for query, key in spatial:
        cond, uncond, source = query.unflatten(0, (3, 4))
        assert torch.equal(cond, source)
        assert torch.equal(uncond, source)
        own, other, third = key.unflatten(0, (3, 4))
        assert not torch.equal(own, third)
        assert not torch.equal(other, third)


def queries_at_the_first_site(engine, monkeypatch, control):
    """The queries that the first spatial site attends with, [rows, frames, tokens, channels].

    What comes before that site is the same with and without a control.
    """
    seen = []
    attend = operator._attend
    monkeypatch.setattr(
        operator,
        "_attend",
        lambda q, *others, **options: (seen.append(q), attend(q, *others, **options))[1],
    )
    rows = 2 if control is None else 3
    latents_of(engine, control, steps=1)
    monkeypatch.undo()
    first = next(q for q in seen if q.shape[0] == rows * 4)  # [rows * frames, heads, tokens, d]
    return first.transpose(1, 2).flatten(2).unflatten(0, (rows, 4))


def test_halves_cond_leaves_the_unconditional_queries(engine, reference, monkeypatch):
    cond, uncond = queries_at_the_first_site(engine, monkeypatch, None)
    control = kq.QueryInjection(reference, until=1.0, halves="cond")
    injected, kept, source = queries_at_the_first_site(engine, monkeypatch, control)
    assert torch.equal(injected, source)
    assert not torch.equal(injected, cond)
    torch.testing.assert_close(kept, uncond, rtol=1e-4, atol=1e-5)


def test_a_region_is_injected_where_it_is_and_nowhere_else(engine, reference, monkeypatch):
    own, _ = queries_at_the_first_site(engine, monkeypatch, None)
    corner = np.zeros((16, 16))
    corner[:8, 8:] = 1  # of the upper right: a transposed or mirrored mask would be seen
    control = kq.QueryInjection(reference, until=1.0, region=corner)
    injected, _, source = queries_at_the_first_site(engine, monkeypatch, control)
    inside = torch.zeros(8, 8, dtype=torch.bool)  # latents, at the first site's resolution
    inside[:4, 4:] = True
    inside = inside.flatten()
    torch.testing.assert_close(injected[:, inside], source[:, inside], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(injected[:, ~inside], own[:, ~inside], rtol=1e-4, atol=1e-5)


def test_a_full_region_is_no_region(engine, reference):
    whole = latents_of(engine, kq.QueryInjection(reference, region=np.ones((16, 16))))
    assert torch.equal(whole, latents_of(engine, kq.QueryInjection(reference)))


def test_controls_with_different_regions_differ(reference):
    one, same, other = (
        kq.QueryInjection(reference, region=np.full((4, 4), value)) for value in (1.0, 1.0, 0.5)
    )
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != kq.QueryInjection(reference)


def test_the_leak_reduced_queries_keep_the_clips_own_mean(engine, reference, monkeypatch):
    seen = []
    attend = operator._attend
    monkeypatch.setattr(
        operator,
        "_attend",
        lambda q, *others, **options: (seen.append(q), attend(q, *others, **options))[1],
    )
    latents_of(engine, steps=1)
    plain = next(q for q in seen if q.shape[0] == 2 * 4)
    seen.clear()
    latents_of(engine, kq.QueryInjection(reference, until=1.0, reduce_leak=True), steps=1)
    reduced = next(q for q in seen if q.shape[0] == 3 * 4)  # the first site: its input is the same
    own, other = plain.unflatten(0, (2, 4))[0], reduced.unflatten(0, (3, 4))
    torch.testing.assert_close(other[0].mean(0), own.mean(0), rtol=1e-4, atol=1e-5)
    source = other[2]
    torch.testing.assert_close(
        other[0] - other[0].mean(0), source - source.mean(0), rtol=1e-4, atol=1e-5
    )


def test_sites_may_be_named(engine, reference):
    first = next(s.name for s in engine.denoiser.sites if s.kind is SiteKind.SPATIAL)
    block = ".".join(first.split(".")[:2])
    for name in (first, block):
        got = latents_of(engine, kq.QueryInjection(reference, sites=[name]))
        assert not torch.equal(got, latents_of(engine))
    with pytest.raises(kq.RequestError, match=r"got 'up_blocks\.9'; this network has \d+, such as"):
        latents_of(engine, kq.QueryInjection(reference, sites=["up_blocks.9"]))


def test_fresh_noise_differs_between_steps_and_shared_does_not(engine, reference):
    for noise, same in (("shared", True), ("fresh", False)):
        control = kq.QueryInjection(reference, source_noise=noise)
        source = engine.resolve(kq.Request("x", control, frames=4)).controls.query.source
        assert torch.equal(source.noise(900.0), source.noise(100.0)) is same
        assert torch.equal(source.noise(900.0), source.noise(900.0))


def test_the_source_may_be_seen_as_what_its_reader_shows(engine, reference):
    own = latents_of(engine, kq.QueryInjection(reference, source_prompt=None))
    said = latents_of(engine, kq.QueryInjection(reference, source_prompt="a red circle"))
    silent = latents_of(engine, kq.QueryInjection(reference))
    assert torch.equal(own, said)
    assert not torch.equal(own, silent)


def test_the_reference_may_give_the_initial_noise(engine, reference):
    control = kq.QueryInjection(reference, until=0.0, noise_prior=0.5)
    request = kq.Request("a red circle", control, frames=4, steps=4)
    resolved = engine.resolve(request).controls.noise
    clean = engine.encode(reference)
    noise = inversion.invert(engine.checkpoint, engine.denoiser, clean)
    torch.testing.assert_close(resolved.noise, noise / noise.std(correction=0))
    assert resolved.share == 0.5
    assert not torch.equal(latents_of(engine, control), latents_of(engine))


def test_two_noises_are_refused(engine, reference):
    both = [
        kq.QueryInjection(reference, noise_prior=0.5),
        kq.MotionInjection(reference, noise_prior=0.5),
    ]
    with pytest.raises(kq.RequestError, match="noise_prior: one control alone may bring its noise"):
        latents_of(engine, both)


def test_a_control_leaves_the_network_as_it_was(tiny_folder, family, reference):
    engine = kq.Engine.load(tiny_folder(family))
    network = engine.checkpoint.unet
    before = {name: value.clone() for name, value in network.state_dict().items()}
    latents_of(engine, kq.QueryInjection(reference))
    engine.close()
    # A product whose weights are trained takes another way on some CPUs, also without gradients.
    stock = load_stock(tiny_folder(family), family).unet.requires_grad_(False)
    assert [type(m) for m in network.modules()] == [type(m) for m in stock.modules()]
    assert {n: type(p) for n, p in network.attn_processors.items()} == {
        n: type(p) for n, p in stock.attn_processors.items()
    }
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    latents, text = torch.randn(2, 4, 4, 8, 8), torch.randn(2, 24, 16)
    with torch.no_grad():
        assert torch.equal(
            predict_stock(network, family, latents, 10, text),
            predict_stock(stock, family, latents, 10, text),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": 1.5}, "until: must be a number from 0 to 1, got 1.5"),
        ({"until": float("nan")}, "until: must be a number from 0 to 1, got nan"),
        ({"noise_prior": 2}, "noise_prior: must be a number from 0 to 1, got 2"),
        ({"source_from": -0.1}, "source_from: must be a number from 0 to 1, got -0.1"),
        ({"alpha": -1}, "alpha: must be a number from 0 to 1, got -1"),
        ({"halves": "uncond"}, "halves: must be 'both' or 'cond', got 'uncond'"),
        ({"source_noise": "new"}, "source_noise: must be 'shared' or 'fresh', got 'new'"),
        ({"reference": "zigzag.mp4"}, "reference: must be a Clip, got str"),
        (
            {"reference": kq.Clip.from_array(np.zeros((1, 8, 8, 3), np.uint8))},
            "reference: must have at least 2 frames to hold motion, got 1",
        ),
    ],
)
def test_says_what_is_wrong(reference, options, message):
    with pytest.raises(kq.RequestError, match=message):
        kq.QueryInjection(**({"reference": reference} | options))


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (np.zeros((16, 16)), "region: must hold at least one place"),
        (np.full((16, 16), 2.0), "region: must hold numbers from 0 to 1"),
        (np.ones((3, 16, 16)), r"\[frames = 4, height, width\], got \[3, 16, 16\]"),
        (np.ones(16), r"got \[16\]"),
    ],
)
def test_says_what_is_wrong_with_a_region(engine, reference, region, message):
    with pytest.raises(kq.RequestError, match=message):
        latents_of(engine, kq.QueryInjection(reference, region=region))


def test_two_of_a_kind_are_refused(engine, reference):
    with pytest.raises(kq.RequestError, match="at most one QueryInjection acts on a clip"):
        latents_of(engine, [kq.QueryInjection(reference), kq.QueryInjection(reference)])
    with pytest.raises(
        kq.RequestError, match=r"must be QueryInjection, MotionInjection, .* or \w+, got int"
    ):
        latents_of(engine, 3)
