"""Motion injection on tiny networks with random weights, against the plain way of doing it."""

import numpy as np
import pytest
import torch
from stock import load_stock, predict_stock, record_projections, replaced_projections

import kinetiq as kq
from kinetiq import attention
from kinetiq.families import SiteKind
from kinetiq.text import encode_prompts

TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32


def latents_of(engine, control=None, **options):
    options = {"seed": 3, "frames": 4, "steps": 3, "guidance_scale": 3.0} | options
    return next(engine.generate_latents([kq.Request("a red circle", control, **options)]))


def plain_two_passes(engine, family, folder, control, parts, until):
    """Record the source's projections at each step, then move the deviations by hooks."""
    pipeline = load_stock(folder, family)
    network, scheduler = pipeline.unet.requires_grad_(False), pipeline.scheduler
    source = engine.resolve(kq.Request("x", control, frames=4, steps=3)).controls.motion.source
    names = [
        f"{site.name}.to_{part}"
        for site in engine.denoiser.sites
        for part in parts
        if site.kind is SiteKind.TEMPORAL
    ]
    negative, positive, silent = encode_prompts(pipeline, ["", "a red circle", ""])
    scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn((1, 4, 4, 8, 8), generator=generator)
    for step, t in enumerate(scheduler.timesteps):
        both, text = sample.repeat(2, 1, 1, 1, 1), torch.stack([negative, positive])
        seen = {}
        if step < until:
            share = scheduler.alphas_cumprod[t]
            noised = share.sqrt() * source.latents + (1 - share).sqrt() * source.noise(float(t))
            seen = record_projections(
                network,
                names,
                lambda noised=noised, t=t: predict_stock(
                    network, family, noised[None], t, silent[None]
                ),
            )

        def move(name, out, seen=seen):  # [rows * positions, frames, channels]
            other = seen[name].repeat(2, 1, 1)
            return out.mean(1, keepdim=True) + other - other.mean(1, keepdim=True)

        with replaced_projections(network, names if seen else [], move):
            uncond, cond = predict_stock(network, family, both, t, text)
        sample = scheduler.step(uncond + 3.0 * (cond - uncond), t, sample[0]).prev_sample[None]
    return sample[0]


@pytest.mark.parametrize("parts", ["qkv", "qk", "v"])
def test_equals_the_plain_two_pass_way(engine, family, tiny_folder, reference, parts):
    control = kq.MotionInjection(reference, until=0.7, parts=parts)
    wanted = plain_two_passes(engine, family, tiny_folder(family), control, parts, until=2)
    got = latents_of(engine, control)
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    assert (got - latents_of(engine)).abs().max() > 0.05 * wanted.abs().max()  # it does something


def test_until_zero_is_plain_generation_bit_for_bit(engine, reference):
    assert torch.equal(
        latents_of(engine, kq.MotionInjection(reference, until=0.0)), latents_of(engine)
    )


def test_blend_zero_changes_nothing_and_half_lies_between(engine, reference):
    plain = latents_of(engine)
    none = latents_of(engine, kq.MotionInjection(reference, blend=0.0))
    half = latents_of(engine, kq.MotionInjection(reference, blend=0.5))
    assert (none - plain).abs().max() <= TOLERANCE * plain.abs().max()
    assert (half - plain).abs().max() > 0.01 * plain.abs().max()


def test_composes_with_query_injection_on_one_source_row(engine, reference):
    both = [kq.QueryInjection(reference, until=1.0), kq.MotionInjection(reference)]
    got = latents_of(engine, both)
    assert not torch.equal(got, latents_of(engine, both[0]))
    assert not torch.equal(got, latents_of(engine, both[1]))


def test_a_region_acts_where_it_is_and_nowhere_else(engine, reference, monkeypatch):
    """At the last temporal site, whose input holds what all before it did: by its own tensors."""
    seen = []
    move = attention.frame_attention

    def spy(query, key, value, **options):
        seen.append((query, options["deviation_blend"]))
        return move(query, key, value, **options)

    monkeypatch.setattr(attention, "frame_attention", spy)
    corner = np.zeros((16, 16))
    corner[:8, 8:] = 1
    latents_of(engine, kq.MotionInjection(reference, blend=0.5, region=corner), steps=1)
    inside = torch.zeros(8, 8)
    inside[:4, 4:] = 0.5
    _, share = next(pair for pair in seen if pair[0].shape[2] == 64)
    assert torch.equal(share[0], inside.flatten().expand(4, -1))
    assert torch.equal(share[1], share[0])
    assert not share[2].any()  # the source keeps its own


def test_a_full_region_is_no_region(engine, reference):
    whole = latents_of(engine, kq.MotionInjection(reference, region=np.ones((8, 8))))
    without = latents_of(engine, kq.MotionInjection(reference))
    assert (whole - without).abs().max() <= TOLERANCE * without.abs().max()


def test_a_block_names_its_temporal_sites(engine, reference):
    resolved = engine.resolve(
        kq.Request("x", kq.MotionInjection(reference, sites=["up_blocks.1"]), frames=4)
    )
    chosen = [
        site
        for site, use in zip(engine.denoiser.sites, resolved.controls.motion.sites, strict=True)
        if use
    ]
    assert chosen
    assert all(s.kind is SiteKind.TEMPORAL and s.name.startswith("up_blocks.1") for s in chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": "qx"}, "parts: must be letters among q, k and v, got 'qx'"),
        ({"parts": ""}, "parts: must be letters among q, k and v, got ''"),
        ({"parts": "qq"}, "parts: must be letters among q, k and v, got 'qq'"),
        ({"blend": 2.0}, "blend: must be a number from 0 to 1, got 2.0"),
    ],
)
def test_says_what_is_wrong(reference, options, message):
    with pytest.raises(kq.RequestError, match=message):
        kq.MotionInjection(reference, **options)


def test_spatial_sites_are_refused(engine, reference):
    with pytest.raises(kq.RequestError, match="motion injection acts at temporal sites"):
        latents_of(engine, kq.MotionInjection(reference, sites="spatial"))
