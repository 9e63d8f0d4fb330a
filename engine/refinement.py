"""Refinement: outputs of spatial self-attention at matching patches of shots, drawn together.

    o'[i, f, x] = (1 - Σ_j s_ij) o[i, f, x] + Σ_j s_ij o[j, f, y_j]
    y_j         = argmax_y cos(d[i, f, x], d[j, f, y]), y a patch of the subject
    s_ij        = alpha · mask[i, f, x] / n for the n shots j that match well, else 0

d are feature maps of the shots left alone. A match is good when its cosine is not below the
threshold of Otsu among all matches of a shot's subject. The shares are a mean over the shots that
match, so that all shots draw towards a common look; taking the single best one would let pairs of
shots swap theirs.

Source: "Motion by Queries", arXiv:2412.07750, sec. 5; Tewel et al., "ConsiStory",
arXiv:2402.03286, sec. 3.3.
"""

import torch
from torch import Tensor

from kinetiq.control_tensors import PatchMatches, RefineControl
from kinetiq.patch_matching import best_matches, levels, resized
from kinetiq.subject_masks import otsu_threshold


def other_shots(shots: int) -> Tensor:
    """For each shot the others in their order, int64 [shots, shots - 1]."""
    every = torch.arange(shots).repeat(shots, 1)
    return every[~torch.eye(shots, dtype=torch.bool)].view(shots, shots - 1)


def find_patches(features: Tensor, masks: Tensor, alpha: float) -> PatchMatches:
    """Where each shot's subject is matched by the others', all at one size.

    Args:
        features: [shots, frames, tokens, channels].
        masks: [shots, frames, tokens], the share of each token that the subject covers.
        alpha: the share that is taken over.

    Returns:
        Shares in float32.
    """
    others = other_shots(len(features)).to(features.device)
    # At coarse sizes a subject may cover no token by half.
    subject = (masks > 0) & (masks >= masks.amax(2, keepdim=True) / 2)
    tokens, goods = [], []
    for shot, theirs in enumerate(others):
        own = features[shot].expand(len(theirs), *features.shape[1:]).flatten(0, 1)
        candidates = subject[theirs]
        there = candidates.any(2, keepdim=True)  # the other shot shows a subject in this frame
        token, cosine = best_matches(
            own, features[theirs].flatten(0, 1), (candidates | ~there).flatten(0, 1)
        )
        token, cosine = (t.unflatten(0, there.shape[:2]) for t in (token, cosine))
        asked = subject[shot] & there
        good = torch.zeros_like(asked)
        if bool(asked.any()):
            good = asked & (cosine >= otsu_threshold(cosine[asked]))
        tokens.append(token)
        goods.append(good)
    good = torch.stack(goods).float()
    share = alpha * masks.float()[:, None] * good / good.sum(1, keepdim=True).clamp(min=1)
    return PatchMatches(torch.stack(tokens), share)


def patches_at_levels(features: Tensor, masks: Tensor, alpha: float) -> dict[int, PatchMatches]:
    """`find_patches` at every size that a site may have, by its number of tokens.

    Args:
        features: [shots, frames, channels, h, w], at the latents' size.
        masks: [shots, frames, h, w], likewise.
        alpha: the share that is taken over.
    """
    found = {}
    for size in levels(*masks.shape[-2:]):
        patches = resized(features, size).flatten(3).transpose(2, 3)
        shares = resized(masks[:, :, None], size).flatten(2)
        found[size[0] * size[1]] = find_patches(patches, shares, alpha)
    return found


def refine_outputs(out: Tensor, control: RefineControl) -> Tensor:
    """Outputs [rows, frames, tokens, channels] with those of the control's readers refined."""
    matches = control.matches[out.shape[2]]
    share = matches.share.to(out.dtype)[..., None]
    own = out.index_select(0, control.readers)
    refined = own * (1 - share.sum(1))
    for other in range(control.others.shape[1]):
        theirs = out.index_select(0, control.others[:, other])
        token = matches.token[:, other, ..., None].expand_as(theirs)
        refined = refined + share[:, other] * theirs.gather(2, token)
    return out.index_copy(0, control.readers, refined)
