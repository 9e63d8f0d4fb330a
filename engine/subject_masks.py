"""Where the subject of a shot is: masks at the latents' size, from attention or from a user.

Places of the subject pay more attention to its words. That attention, a mean over heads, sites
and steps, is cut in two by Otsu's threshold.

Source: "Motion by Queries", arXiv:2412.07750, sec. 5; Tewel et al., "ConsiStory",
arXiv:2402.03286, sec. 3.1; Otsu, IEEE Trans. Syst. Man Cybern. 9 (1979), p. 62.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.errors import KinetiqError, RequestError, WorkError
from kinetiq.patch_matching import levels

FindMasks = Callable[[tuple[np.ndarray, ...]], Any]


def otsu_threshold(values: Tensor) -> Tensor:
    """The least value of the upper of two classes whose means are farthest apart, a scalar.

    Of all ways to cut the sorted values in two, the one of the greatest variance between the
    classes, n_low n_high (mean_high - mean_low)²; the lowest of equal ones. Where all values are
    equal there is but one class, and the threshold is that value.

    Args:
        values: at least one, of any shape.
    """
    ordered = values.flatten().double().sort().values
    number = len(ordered)
    if number == 1 or bool(ordered[0] == ordered[-1]):
        return values.flatten()[0]
    low = torch.arange(1, number, dtype=torch.float64, device=values.device)
    # Sums from the mean, since large values would hide small differences of theirs.
    sums = (ordered - ordered.mean()).cumsum(0)[:-1]
    between = sums**2 * number / (low * (number - low))
    between[ordered[1:] == ordered[:-1]] = -1.0  # equal values stay together
    return ordered[between.argmax() + 1].to(values.dtype)


def attention_map(words: Mapping[int, Tensor], size: tuple[int, int]) -> Tensor:
    """The attention to the subject's words at the latents' size, [n, frames, h, w].

    Args:
        words: by site, [n, frames, tokens].
        size: height and width of the latents.
    """
    sizes = {height * width: (height, width) for height, width in levels(*size)}
    maps = [
        F.interpolate(
            kept.unflatten(2, sizes[kept.shape[2]]), size=size, mode="bilinear", align_corners=False
        )
        for kept in words.values()
    ]
    return torch.stack(maps).mean(0)


def subject_masks(maps: Tensor) -> Tensor:
    """Maps [shots, frames, h, w] cut in two, all frames of a shot by one threshold; 0 or 1."""
    cuts = torch.stack([otsu_threshold(shot) for shot in maps])
    return (maps >= cuts[:, None, None, None]).float()


def fit_masks(masks: Any, shape: tuple[int, int, int], shots: int) -> Tensor:
    """A user's masks at the latents' size [shots, frames, h, w], averaged over their area.

    Args:
        masks: one array a shot, [frames, h, w] or [h, w] of any size, 0 to 1.
        shape: frames, latent height, latent width.
        shots: how many there are.

    Raises:
        RequestError: there are more or fewer, or one has another rank, frame count or range.
    """
    listed = is_listed(masks)
    if not listed or len(masks) != shots:
        came = len(masks) if listed else type(masks).__name__
        raise RequestError(f"masks: must be one array for each of {shots} shots, got {came}")
    return torch.stack(
        [_fit(mask, shape, f"masks: that of shot {n}") for n, mask in enumerate(masks, start=1)]
    )


def is_listed(masks: Any) -> bool:
    """Whether masks are a list, an array or a tensor of one mask a shot."""
    if isinstance(masks, np.ndarray | Tensor):
        return masks.ndim > 0
    return isinstance(masks, Sequence) and not isinstance(masks, str)


def as_array(mask: Any) -> np.ndarray:
    """A copy of one mask, float32.

    Raises:
        TypeError: it is no array of numbers; or ValueError.
    """
    return np.array(mask.numpy(force=True) if isinstance(mask, Tensor) else mask, dtype=np.float32)


def find_masks(
    find: FindMasks, frames: tuple[np.ndarray, ...], shape: tuple[int, int, int]
) -> Tensor:
    """What a user's callable finds in the clean frames of each shot, fitted like `fit_masks`.

    Raises:
        RequestError: see `fit_masks`.
        WorkError: the callable failed; its own error is the cause.
    """
    try:
        found = find(frames)
    except KinetiqError:
        raise
    except Exception as error:  # whatever it is, it is this board's alone
        raise WorkError(
            f"masks: the callable must return one array for each of {len(frames)} shots, and "
            f"raised {type(error).__name__}: {error}"
        ) from error
    return fit_masks(found, shape, len(frames))


def _fit(given: Any, shape: tuple[int, int, int], where: str) -> Tensor:
    frames, height, width = shape
    try:
        mask = torch.tensor(as_array(given))
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where} must be an array of numbers: {error}") from error
    if mask.ndim == 2:
        mask = mask.expand(frames, *mask.shape)
    if mask.ndim != 3 or mask.shape[0] != frames or 0 in mask.shape:
        raise RequestError(
            f"{where} must be [height, width] or [frames = {frames}, height, width], got "
            f"{list(np.shape(given))}"
        )
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise RequestError(f"{where} must hold numbers from 0 to 1, got others")
    return F.interpolate(mask[None], size=(height, width), mode="area")[0]


def drop_places(masks: Tensor, share: float, seeds: Sequence[int], step: int) -> Tensor:
    """Masks [shots, ...] with a share of their places set to 0, the same for the same seeds."""
    if share == 0.0:
        return masks
    kept = []
    for mask, seed in zip(masks, seeds, strict=True):
        generator = torch.Generator().manual_seed((1_000_003 * seed + step) % 2**63)
        kept.append(torch.rand(mask.shape, generator=generator) >= share)
    return masks * torch.stack(kept).to(masks)
