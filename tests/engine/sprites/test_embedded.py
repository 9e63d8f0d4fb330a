"""The embedded model itself: what a reference does to its clips, as a mean over seeds."""

import numpy as np
import pytest
import torch

import kinetiq as kq
from kinetiq.sprites import cases, metrics, world
from kinetiq.sprites.reading import read_clips

SEEDS = 4
PROMPT = "a red circle on a dark blue background"


@pytest.fixture(scope="module")
def engine():
    with kq.Engine.load("sprites") as loaded:
        yield loaded


def mean_path(engine, reference):
    """Mean over seeds of the path of clips that are steered by this reference."""
    requests = [
        kq.Request(PROMPT, kq.MotionInjection(reference), seed=seed, steps=8)
        for seed in range(SEEDS)
    ]
    clips = list(engine.generate_many(requests))
    readings = read_clips(np.stack([clip.frames for clip in clips]))
    # A clip that shows nothing went nowhere; it stays in the mean and makes it shorter.
    nowhere = world.Path("still").points(clips[0].frames.shape[0])
    paths = [metrics.first_path(reading) for reading in readings]
    return np.mean([nowhere if path is None else path for path in paths], axis=0)


def test_a_mirrored_reference_mirrors_the_path_and_a_reversed_one_reverses_it(engine):
    path = world.Path("left", travel=0.5)
    scene = world.Scene((world.Sprite("square", 135.0, path),), background_hue=300.0)
    reference = cases.render_clip(scene)
    plain = mean_path(engine, reference)
    mirrored, reversed_ = (
        mean_path(engine, clip) for clip in (reference.mirror(), reference.reverse())
    )
    steered = metrics.path_fidelity(plain, path.points(8))
    assert steered > 0.2  # there is an effect, and the oracles follow it as far as it goes
    assert metrics.path_fidelity(mirrored, metrics.mirror_path(plain)) > 0.5
    assert metrics.path_fidelity(reversed_, metrics.reverse_path(plain)) > 0.5
    assert metrics.path_fidelity(mirrored, plain) < -0.5
    assert metrics.path_fidelity(reversed_, plain) < -0.5


def test_the_stock_pipeline_generates_from_the_embedded_folder(engine):
    from diffusers import AnimateDiffPipeline

    pipeline = AnimateDiffPipeline.from_pretrained(engine.checkpoint.path)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        PROMPT,
        num_frames=8,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).frames[0]
    clip = engine.generate(PROMPT, seed=5, steps=2, guidance_scale=3.0)
    assert np.abs(clip.frames - frames * 255).max() <= 1.0  # rounding to whole levels


def test_the_checkpoint_is_small_and_names_no_path(engine):
    files = [path for path in engine.checkpoint.path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    for path in files:
        if path.suffix == ".json":
            assert "_name_or_path" not in path.read_text(), path
