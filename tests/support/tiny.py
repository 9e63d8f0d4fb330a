"""Tiny stock models with random weights that are far from degenerate.

Freshly built diffusers modules are no test of anything temporal: the last convolution of a
temporal layer is zero and attention is close to uniform. Here every weight is drawn again, so
that outputs are of order one, attention logits have a standard deviation of about two, and every
layer matters. All builders are deterministic and leave the global random state alone.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

CROSS_WIDTH = 16
MAX_TOKENS = 24  # model_max_length of the tokenizer
MOTION_FRAMES = 32  # motion_max_seq_length
SPATIAL_FACTOR = 2  # pixels a latent cell, along each side
LATENT_MULTIPLE = 4  # height and width of latents must be multiples of it

_QUERY_KEY = ("to_q", "to_k", "q_proj", "k_proj")
_QUERY_KEY_GAIN = 1.5  # logits have a standard deviation of its square

_SPATIAL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": CROSS_WIDTH,
}
_ANIMATEDIFF = _SPATIAL | {
    "down_block_types": (
        "CrossAttnDownBlockMotion",
        "CrossAttnDownBlockMotion",
        "DownBlockMotion",
    ),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": MOTION_FRAMES,
    "use_motion_mid_block": True,
}
_UNET3D = _SPATIAL | {
    "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
    "attention_head_dim": 8,
}
_UNET2D = _SPATIAL | {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,  # SD 1.5 keeps its number of heads under this name
}
_ADAPTER = {
    "block_out_channels": (16, 32, 32),
    "motion_layers_per_block": 1,
    "motion_num_attention_heads": 2,
    "motion_norm_num_groups": 8,
    "motion_max_seq_length": MOTION_FRAMES,
    "use_motion_mid_block": True,
}
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
    "scaling_factor": 0.5,
}
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "steps_offset": 1,
    "clip_sample": False,
}


def tiny_animatediff(seed: int = 0, **overrides: Any) -> Any:
    """A UNetMotionModel of three levels, two of them with attention; `overrides` are config keys.

    Inputs: latents [rows, 4, frames, h, w] with h, w multiples of `LATENT_MULTIPLE`, text
    [rows * frames, tokens, `CROSS_WIDTH`].
    """
    from diffusers import UNetMotionModel

    return _build(UNetMotionModel, _ANIMATEDIFF | overrides, seed)


def tiny_unet3d(seed: int = 0, **overrides: Any) -> Any:
    """A UNet3DConditionModel of the same size; text is [rows, tokens, `CROSS_WIDTH`]."""
    from diffusers import UNet3DConditionModel

    return _build(UNet3DConditionModel, _UNET3D | overrides, seed)


NETWORKS: Mapping[str, Callable[..., Any]] = MappingProxyType(  # by the family that they are of
    {"animatediff": tiny_animatediff, "unet3d": tiny_unet3d}
)


def tiny_unet2d(seed: int = 0, **overrides: Any) -> Any:
    """A UNet2DConditionModel as in SD 1.5, to be inflated by `tiny_adapter`."""
    from diffusers import UNet2DConditionModel

    return _build(UNet2DConditionModel, _UNET2D | overrides, seed)


def tiny_adapter(seed: int = 0, **overrides: Any) -> Any:
    """A MotionAdapter that fits `tiny_unet2d`."""
    from diffusers import MotionAdapter

    return _build(MotionAdapter, _ADAPTER | overrides, seed)


def tiny_vae(seed: int = 0, **overrides: Any) -> Any:
    """An AutoencoderKL that halves the width; its frames are multiples of 2 pixels."""
    from diffusers import AutoencoderKL

    return _build(AutoencoderKL, _VAE | overrides, seed)


def tiny_tokenizer(folder: Path) -> Any:
    """Write the CLIP tokenizer of the sprites world to `folder` and load it."""
    from kinetiq.sprites.components import build_tokenizer

    return build_tokenizer(folder)


def tiny_text_encoder(tokenizer: Any, seed: int = 0, **overrides: Any) -> Any:
    """A CLIPTextModel of two layers and width `CROSS_WIDTH` for `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": CROSS_WIDTH,
        "intermediate_size": 2 * CROSS_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": CROSS_WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        model = CLIPTextModel(CLIPTextConfig(**(config | overrides)))
    return randomise(model, seed)


def tiny_scheduler(name: str = "DDIMScheduler", **overrides: Any) -> Any:
    """The diffusers scheduler `name` with a linear schedule of 1000 steps."""
    import diffusers

    scheduler = getattr(diffusers, name)
    known = inspect.signature(scheduler.__init__).parameters
    config = {key: value for key, value in _SCHEDULER.items() if key in known}
    return scheduler(**(config | overrides))


def write_tiny_folder(
    path: Path,
    family: str = "animatediff",
    scheduler: str = "DDIMScheduler",
    scheduler_overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    unet_overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Save a complete diffusers pipeline folder to `path` and return `path`."""
    path = Path(path)
    parts = _common_parts(path, scheduler, scheduler_overrides, seed)
    if family == "animatediff":
        from diffusers import AnimateDiffPipeline

        unet = tiny_animatediff(seed, **(unet_overrides or {}))
        pipeline = AnimateDiffPipeline(**parts, unet=unet, motion_adapter=None)
    elif family == "unet3d":
        from diffusers import TextToVideoSDPipeline

        unet = tiny_unet3d(seed, **(unet_overrides or {}))
        pipeline = TextToVideoSDPipeline(**parts, unet=unet)
    else:
        raise ValueError(f"write_tiny_folder: no such family: {family!r}")
    _save(pipeline, path)
    return path


def write_tiny_base_and_adapter(path: Path, seed: int = 0) -> tuple[Path, Path]:
    """Save a folder like SD 1.5 and a MotionAdapter folder; return (base, adapter)."""
    from diffusers import StableDiffusionPipeline

    base, adapter = Path(path) / "base", Path(path) / "adapter"
    pipeline = StableDiffusionPipeline(
        **_common_parts(base, "DDIMScheduler", None, seed),
        unet=tiny_unet2d(seed),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _save(pipeline, base)
    _save(tiny_adapter(seed), adapter)
    return base, adapter


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters of `module` again, in place: see the top of this file."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                noise = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)  # a norm's gain
            elif "embedding.weight" not in name:
                gain = _QUERY_KEY_GAIN if name.split(".")[-2] in _QUERY_KEY else 1.0
                noise *= gain / math.sqrt(parameter[0].numel())
            parameter.copy_(noise)
    return module.eval().requires_grad_(False)


def _build(model: Any, config: Mapping[str, Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        module = model(**config)
    return randomise(module, seed)


def _common_parts(
    path: Path, scheduler: str, scheduler_overrides: Mapping[str, Any] | None, seed: int
) -> dict[str, Any]:
    tokenizer = tiny_tokenizer(path / "tokenizer")
    return {
        "vae": tiny_vae(seed),
        "text_encoder": tiny_text_encoder(tokenizer, seed),
        "tokenizer": tokenizer,
        "scheduler": tiny_scheduler(scheduler, **(scheduler_overrides or {})),
    }


def _save(part: Any, path: Path) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        part.save_pretrained(path, safe_serialization=True)
    finally:
        if shown:
            logging.enable_progress_bar()
