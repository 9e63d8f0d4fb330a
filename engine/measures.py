"""How well a clip of any checkpoint did what was asked, where no world says the truth.

    tracklet fidelity   (mean over t' in T' of max over t in T of c(t, t')
                         + mean over t in T of max over t' in T' of c(t, t')) / 2,
                        c(t, t') the mean over steps of the cosine of the two displacements
    text similarity     mean over frames of the cosine of CLIP's embeddings of frame and prompt
    frame consistency   mean over all pairs of frames of the cosine of CLIP's embeddings

T and T' are the tracks of points in the two clips, from any tracker. The first is halved, so that
it is 1 for equal motions; where it is printed without the half, that is twice this number. It
tells directions alone: a motion twice as large counts as the same. The cosines are not multiplied
by 100, as papers often do.

Source: tracklets, Yatim et al., arXiv:2311.17009, sec. 5; CLIP, Radford et al., arXiv:2103.00020,
its use on frames as in Motion Inversion, arXiv:2403.20193, sec. 4.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.clip import Clip
from kinetiq.errors import CheckpointError, RequestError, ShapeError

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images that CLIP was trained on, by channel
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def tracklet_fidelity(tracks: np.ndarray, reference: np.ndarray) -> float:
    """How alike the motions of points in two clips are, -1 to 1; see the top of this file.

    A step in which both points stand still counts 1, one in which one of them does 0.

    Args:
        tracks: of the generated clip, [points, frames, 2], in any unit.
        reference: of the clip whose motion was wanted, [other points, frames, 2].

    Raises:
        ShapeError: the shapes are others, there are no points, or fewer than two frames.
        RequestError: a track is not finite.
    """
    for name, given in (("tracks", tracks), ("reference", reference)):
        if given.ndim != 3 or given.shape[2] != 2 or given.shape[0] < 1 or given.shape[1] < 2:
            raise ShapeError(
                f"tracklet_fidelity: {name} must be [points, frames, 2] of at least one point and "
                f"two frames, got {list(given.shape)}"
            )
        if not np.isfinite(given).all():
            raise RequestError(
                f"tracklet_fidelity: {name} must be finite, got NaN or infinity; leave out points "
                "that are not seen in all frames"
            )
    if tracks.shape[1] != reference.shape[1]:
        raise ShapeError(
            "tracklet_fidelity: both must have the same frames, got "
            f"{tracks.shape[1]} and {reference.shape[1]}"
        )
    (mine, moves), (wanted, is_wanted) = (_directions(given) for given in (tracks, reference))
    cosines = np.einsum("pfx,qfx->pq", mine, wanted)
    both_still = np.einsum("pf,qf->pq", ~moves, ~is_wanted, dtype=np.float64)
    alike = (cosines + both_still) / mine.shape[1]
    return float(alike.max(axis=0).mean() + alike.max(axis=1).mean()) / 2


def _directions(tracks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Displacements of unit length, 0 where a point stands still, and whether it moves."""
    steps = np.diff(tracks.astype(np.float64), axis=1)
    lengths = np.linalg.norm(steps, axis=2)
    moves = lengths > 0
    return steps / np.where(moves, lengths, 1.0)[..., None], moves


@dataclass(frozen=True, eq=False)
class ImageTextModel:
    """A CLIP model and its tokenizer, from `load_image_text_model`."""

    model: Any
    tokenizer: Any

    @property
    def pixels(self) -> int:
        """Side of the square images that it sees."""
        return int(self.model.config.vision_config.image_size)


def load_image_text_model(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> ImageTextModel:
    """Load a CLIP model from a folder of transformers, such as that of clip-vit-base-patch32.

    Args:
        folder: config.json, safetensors weights, and the files of the tokenizer.
        device: where it runs; in float32.

    Raises:
        CheckpointError: it is no such folder.
    """
    from transformers import CLIPModel, CLIPTokenizer

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"measure: {path} must be the folder of a CLIP model, with its config"
        )
    try:
        model = CLIPModel.from_pretrained(
            path, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # what the readers of foreign files may raise has no end
        raise CheckpointError(
            f"measure: {path} must hold a CLIP model as safetensors and its tokenizer ({error})"
        ) from error
    return ImageTextModel(model.to(device).eval().requires_grad_(False), tokenizer)


def text_similarity(model: ImageTextModel, clip: Clip, prompt: str) -> float:
    """Mean cosine of the embeddings of a clip's frames and of a prompt, -1 to 1.

    A prompt that is longer than the model reads is cut off, as it is in generating.
    """
    images, text = embed_frames(model, clip), _embed_text(model, prompt)
    return float((images @ text).mean())


def frame_consistency(model: ImageTextModel, clip: Clip) -> float:
    """Mean cosine of the embeddings of all pairs of a clip's frames, -1 to 1.

    Raises:
        RequestError: the clip has a single frame.
    """
    if clip.num_frames < 2:
        raise RequestError("frame_consistency: a clip must have at least 2 frames, got 1")
    images = embed_frames(model, clip)
    alike = images @ images.T
    above = torch.triu(torch.ones_like(alike, dtype=torch.bool), diagonal=1)
    return float(alike[above].mean())


@torch.no_grad()
def embed_frames(model: ImageTextModel, clip: Clip) -> Tensor:
    """CLIP's embeddings of a clip's frames, [frames, width], of unit length."""
    pixels = prepare_frames(clip, model.pixels).to(model.model.device)
    seen = model.model.vision_model(pixel_values=pixels).pooler_output
    return F.normalize(model.model.visual_projection(seen), dim=-1)


def prepare_frames(clip: Clip, side: int) -> Tensor:
    """A clip's frames as CLIP was trained to see them, float32 [frames, 3, side, side].

    They are brought to that size by their shorter side, bicubic, cropped in the middle, and
    normalised.
    """
    from PIL import Image

    scale = side / min(clip.height, clip.width)
    size = [max(int(length * scale), side) for length in (clip.height, clip.width)]
    images = [
        np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC))
        for frame in clip.frames
    ]
    pixels = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 255.0
    top, left = ((length - side) // 2 for length in size)
    pixels = pixels[:, :, top : top + side, left : left + side]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (_MEAN, _DEVIATION))
    return (pixels - mean) / deviation


@torch.no_grad()
def _embed_text(model: ImageTextModel, prompt: str) -> Tensor:
    inputs = model.tokenizer([prompt], truncation=True, return_tensors="pt").to(model.model.device)
    read = model.model.text_model(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask
    ).pooler_output
    embedding: Tensor = F.normalize(model.model.text_projection(read), dim=-1)[0]
    return embedding
