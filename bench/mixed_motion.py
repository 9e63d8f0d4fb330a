"""Eight clips with eight motions in one batch, over eight clips with one motion.

Clips take the steps that the model takes by default: banks are made once a batch, so that fewer
steps would make more of that than it is.
"""

import functools

import torch

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.measure import time_ratio
from kinetiq.engine import Engine
from kinetiq.families import SiteKind
from kinetiq.motion_embedding import MotionEmbedding, site_size
from kinetiq.motion_file import MotionInfo
from kinetiq.request import Request

CLIPS = 8
QUICK_STEPS = 5


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Time the denoising of both batches in turn."""
    repeats, steps = (3, QUICK_STEPS) if options.quick else (5, None)
    with Engine.load("sprites", device=options.device) as engine:
        motions = [random_motion(engine, seed) for seed in range(CLIPS)]

        def run(count: int) -> None:
            requests = [
                Request("a red circle", motions[n % count], seed=n, steps=steps)
                for n in range(CLIPS)
            ]
            for _ in engine.generate_latents(requests, max_clips=CLIPS):
                pass

        ratio = time_ratio(
            functools.partial(run, CLIPS),
            functools.partial(run, 1),
            repeats=repeats,
            device=options.device,
        )
    return {"mixed_motion.ratio": ratio.figure}


def random_motion(engine: Engine, seed: int) -> MotionEmbedding:
    """An embedding of random numbers at all temporal sites of up and down blocks."""
    generator = torch.Generator().manual_seed(seed)
    defaults = engine.defaults
    size = defaults.height // engine.vae_scale, defaults.width // engine.vae_scale
    query_key, value = {}, {}
    for site in engine.denoiser.sites:
        if site.kind is SiteKind.TEMPORAL and site.place in ("down", "up"):
            shape = (defaults.frames, *site_size(engine.checkpoint.unet, site.name, size))
            noise = torch.randn((*shape, site.width), generator=generator)
            value[site.name] = 0.1 * noise
            query_key[site.name.rpartition(".")[0]] = 0.1 * noise[:, 0, 0]
    info = MotionInfo(
        kind="embedding",
        family=engine.family.name,
        checkpoint=engine.checkpoint.name,
        frames=defaults.frames,
        height=size[0],
        width=size[1],
        loss="mse",
        steps=1,
        prompt="",
        reference="",
    )
    return MotionEmbedding(query_key=query_key, value=value, noise=None, info=info)


BENCH = Bench("mixed_motion", "eight clips with eight motions over eight with one", measure)
