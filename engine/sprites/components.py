"""The components of the embedded checkpoint: tokenizer, text encoder, VAE, UNet, scheduler.

All of them are stock classes of diffusers and transformers, so that
`diffusers.AnimateDiffPipeline.from_pretrained` loads the folder as it would any other.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from kinetiq.sprites.world import COLOURS, MOTION_PHRASES, SHAPES, TEXTURES

PLACING_BLOCK = "down_blocks.2.resnets.0"  # at 4x4 tokens: padding tells each where it is
DRAWING_BLOCK = "up_blocks.2.resnets.1"  # the last one: it draws what attention has decided
ORDINARY_BLOCKS = (PLACING_BLOCK, DRAWING_BLOCK)
SIZE = 32  # pixels
FRAMES = 8
MAX_TOKENS = 24
TEXT_WIDTH = 96
_RESNET = re.compile(r"resnets\.\d+$")
_START, _END = "<|startoftext|>", "<|endoftext|>"

UNET = {
    "sample_size": SIZE // 2,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlockMotion",) * 3,
    "up_block_types": ("CrossAttnUpBlockMotion",) * 3,
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": TEXT_WIDTH,
    "num_attention_heads": (2, 4, 4),
    "motion_num_attention_heads": (2, 4, 4),
    "motion_max_seq_length": 32,
    "use_motion_mid_block": True,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": SIZE,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    # At the noisiest step the signal must be lost, else a network learns to see there what moves
    # where, and has no use for the prompt's word; generation starts from noise that shows nothing.
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
    "steps_offset": 0,
}
DEFAULTS = {
    "frames": FRAMES,
    "height": SIZE,
    "width": SIZE,
    "steps": 25,
    "guidance_scale": 3.0,
    "fps": 8.0,
}


def vocabulary_words() -> list[str]:
    """Every word a caption of the world can hold, sorted."""
    words = {"a", "an", "and", "on", "dark", "background", "shape", *SHAPES, *TEXTURES, *COLOURS}
    for phrase in MOTION_PHRASES.values():
        words.update(phrase.split())
    return sorted(words)


def build_tokenizer(folder: Path) -> Any:
    """Write a CLIP byte-pair vocabulary of the world's words to `folder` and load it.

    Each word is one token, by a chain of merges from its letters; any other text falls back to
    shorter pieces and letters, as with any CLIP tokenizer.
    """
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    merges: list[tuple[str, str]] = []
    for word in vocabulary_words():
        pieces = _apply_merges([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _apply_merges(pieces, merges[-1:])
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [first + second for first, second in merges]
    tokens += [_START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _END,
        "unk_token": _END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(vocabulary_size: int, end_token: int) -> Any:
    """A two-layer CLIP text encoder with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            eos_token_id=end_token,
            bos_token_id=end_token - 1,
            pad_token_id=end_token,
        )
    )


def build_vae() -> Any:
    """A convolutional VAE that halves the width, with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE)


def build_unet() -> Any:
    """The denoiser with random weights, off-centre taps of its ResNet kernels at zero.

    The network leaves spatial mixing to attention, so that attention has work to do. Only
    `ORDINARY_BLOCKS` have ordinary kernels. Training keeps the zeros, since the denoiser runs such
    kernels by their centres (`kinetiq.convolution`), which alone have gradients then.
    """
    from diffusers import UNetMotionModel

    unet = UNetMotionModel(**UNET)
    with torch.no_grad():
        for name, block in unet.named_modules():
            if _RESNET.search(name) and name not in ORDINARY_BLOCKS:
                for convolution in (block.conv1, block.conv2):
                    centre = convolution.weight[:, :, 1, 1] * 3.0  # a ninth of the fan-in
                    convolution.weight.zero_()
                    convolution.weight[:, :, 1, 1] = centre
    return unet


def open_ordinary_kernels(unet: Any) -> None:
    """Let off-centre taps that an earlier checkpoint kept at zero learn from now on.

    Taps that are all zero are read as taps that are to stay so, hence values too small to matter.
    """
    for name in ORDINARY_BLOCKS:
        block = unet.get_submodule(name)
        for convolution in (block.conv1, block.conv2):
            weight = convolution.weight.detach()
            off_centre = torch.ones(3, 3, dtype=torch.bool)
            off_centre[1, 1] = False
            if not weight[:, :, off_centre].any():
                weight[:, :, off_centre] = 1e-5 * torch.randn_like(weight[:, :, off_centre])


def build_scheduler() -> Any:
    """DDIM with the noise schedule the network is trained on."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**SCHEDULER)


def _apply_merges(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Merge adjacent pairs, lowest rank first, as byte-pair encoding does."""
    for pair in merges:
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == pair:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes that CLIP's byte-pair encoding works on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
