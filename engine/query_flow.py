"""Query flow: queries of key frames, moved to the frames between.

    q'[f, x] = w[f] q[A, x_A] + (1 - w[f]) q[B, x_B]
    x_K      = argmax_y cos(g[f, x], g[K, y])

A and B are the key frames around f. The queries q that are moved are a shot's own; what says
where they go, g, are the queries of the same shot left alone, so that the shot keeps its motion
without looking like that shot. Key frames keep their own queries.

Source: "Motion by Queries", arXiv:2412.07750, sec. 5; Geyer et al., "TokenFlow",
arXiv:2307.10373, sec. 4, whose flow of outputs it makes one of queries. The paper's weight of A,
sigmoid((B - f) / (B - A)), is above a half next to B too; the default is linear in the distance.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kinetiq.control_tensors import FlowControl
from kinetiq.patch_matching import best_matches, levels, resized


@dataclass(frozen=True)
class KeyFrames:
    """The key frames around each frame.

    Args:
        before: int64 [frames], the last key frame that is not after each frame.
        after: int64 [frames], the first that is not before it.
        share: float32 [frames], the weight of `before`; 1 at key frames.
    """

    before: Tensor
    after: Tensor
    share: Tensor

    def to(self, device: torch.device) -> "KeyFrames":
        """The same on a device."""
        return KeyFrames(self.before.to(device), self.after.to(device), self.share.to(device))


def place_key_frames(frames: int, spacing: int, weight: str) -> KeyFrames:
    """Key frames at every `spacing`-th frame from the first, and at the last.

    Args:
        frames: of the clip.
        spacing: at least 1, where every frame is a key frame.
        weight: "symmetric" or "paper"; see the head of the file.
    """
    keys = sorted({*range(0, frames, spacing), frames - 1})
    before = [max(key for key in keys if key <= frame) for frame in range(frames)]
    after = [min(key for key in keys if key >= frame) for frame in range(frames)]
    share = [
        1.0 if a == b else _weight((b - frame) / (b - a), weight)
        for frame, (a, b) in enumerate(zip(before, after, strict=True))
    ]
    return KeyFrames(torch.tensor(before), torch.tensor(after), torch.tensor(share))


def _weight(nearness: float, weight: str) -> float:
    return nearness if weight == "symmetric" else 1.0 / (1.0 + math.exp(-nearness))


def find_flow(guide: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The token of both key frames that shows what each token shows, int64 [n, 2, frames, tokens].

    Args:
        guide: [n, frames, tokens, channels].
        before: int64 [frames].
        after: int64 [frames].
    """
    tokens = torch.arange(guide.shape[2], device=guide.device)
    found = tokens.repeat(len(guide), 2, guide.shape[1], 1)
    between = torch.nonzero(before != after).flatten()
    if not len(between):
        return found
    for place, key_frame in enumerate((before, after)):
        patches, others = guide[:, between], guide[:, key_frame[between]]
        token, _ = best_matches(patches.flatten(0, 1), others.flatten(0, 1))
        found[:, place, between] = token.unflatten(0, (len(guide), -1))
    return found


def flow_at_levels(features: Tensor, key_frames: KeyFrames) -> dict[int, Tensor]:
    """`find_flow` in feature maps at every size that a site may have, by its number of tokens.

    Args:
        features: [n, frames, channels, h, w], at the latents' size.
        key_frames: on the same device.
    """
    found = {}
    for size in levels(*features.shape[-2:]):
        guide = resized(features, size).flatten(3).transpose(2, 3)
        found[size[0] * size[1]] = find_flow(guide, key_frames.before, key_frames.after)
    return found


def flow_queries(query: Tensor, control: FlowControl) -> Tensor:
    """Queries [rows, frames, tokens, channels] with those of the control's readers moved."""
    if control.guides is None:
        assert control.matches is not None  # noqa: S101  one of the two is there
        match = control.matches[query.shape[2]]
    else:
        match = find_flow(query.index_select(0, control.guides), control.before, control.after)
    own = query.index_select(0, control.readers)
    share = control.share.to(query.dtype)[:, None, None]
    wide = match[..., None].expand(*match.shape, query.shape[-1])
    first = own.index_select(1, control.before).gather(2, wide[:, 0])
    second = own.index_select(1, control.after).gather(2, wide[:, 1])
    return query.index_copy(0, control.readers, torch.lerp(second, first, share))
