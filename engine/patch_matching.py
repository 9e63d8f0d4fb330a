"""Which patch of one frame shows what a patch of another shows: nearest neighbours by cosine."""

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

_PRODUCTS = 2**26  # cosines that are in memory at a time


def best_matches(
    patches: Tensor, others: Tensor, candidates: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each patch, the other patch of the highest cosine, the first of equal ones.

    Args:
        patches: [n, tokens, channels].
        others: [n, other tokens, channels].
        candidates: bool [n, other tokens], which of the others may be chosen, at least one for
            each n; None: all.

    Returns:
        int64 [n, tokens] and the cosine [n, tokens], in float32 or wider.
    """
    wide = torch.promote_types(patches.dtype, torch.float32)
    tokens, cosines = [], []
    part = max(1, _PRODUCTS // max(1, patches.shape[1] * others.shape[1]))
    for start in range(0, len(patches), part):
        chosen = slice(start, start + part)
        left, right = (F.normalize(t[chosen].to(wide), dim=-1) for t in (patches, others))
        products = left @ right.transpose(1, 2)
        if candidates is not None:
            products.masked_fill_(~candidates[chosen][:, None], -torch.inf)
        cosine, token = products.max(-1)
        tokens.append(token)
        cosines.append(cosine)
    return torch.cat(tokens), torch.cat(cosines)


def levels(height: int, width: int) -> list[tuple[int, int]]:
    """The sizes that the latents may have in a network, which halves them, rounding up."""
    sizes = [(height, width)]
    while sizes[-1] != (1, 1):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [..., channels, h, w] at another size: averaged where smaller, else interpolated."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    smaller = size[0] * size[1] < maps.shape[-2] * maps.shape[-1]
    flat = maps.flatten(0, -4)
    if smaller:
        flat = F.interpolate(flat, size=size, mode="area")
    else:
        flat = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    out: Tensor = flat.unflatten(0, maps.shape[:-3])
    return out
