"""Stock diffusers pipelines, and injection written the plain way, with hooks and two passes."""

import warnings
from contextlib import contextmanager

import torch

PIPELINES = {"animatediff": "AnimateDiffPipeline", "unet3d": "TextToVideoSDPipeline"}


def load_stock(folder, family):
    """The stock pipeline of a folder, quiet."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text-to-video pipeline announces its deprecation
        pipeline = getattr(diffusers, PIPELINES[family]).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_latents(pipeline, prompt, *, seed, **options):
    """Latents [channels, frames, h, w] of the stock pipeline."""
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = pipeline(prompt, generator=generator, output_type="latent", **options)
    return out.frames[0]


def predict_stock(network, family, latents, timestep, text):
    """The stock network's output for [rows, channels, frames, h, w]."""
    if family == "animatediff":
        text = text.repeat_interleave(latents.shape[2], dim=0)
    return network(latents, torch.as_tensor(timestep), text).sample


@contextmanager
def replaced_projections(network, projections, change):
    """Replace the output of each named projection by `change(name, output)`."""
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: change(name, output)
        )
        for name in projections
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record_projections(network, projections, run):
    """Run once and return the output of each named projection."""
    seen = {}

    def keep(name, output):
        seen[name] = output.clone()
        return output

    with replaced_projections(network, projections, keep):
        run()
    return seen
