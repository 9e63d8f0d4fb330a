"""What controls are to the network: tensors, with one entry a row.

A control is data, never a graph change: the network reads these tensors at its attention sites,
and changing their values changes no code path. Which *kinds* of control are present does, so a
kind that no row uses is None and costs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor


@dataclass(frozen=True)
class QueryControl:
    """Whose queries each row uses at each site.

    Args:
        row: int64 [sites, rows]; a row's own index is no injection.
        blend: [rows], or [rows, frames, h, w] for regions; the share of the other row's queries.
        reduced: bool [rows], or None: whether the queries keep the row's own mean over frames.
    """

    row: Tensor
    blend: Tensor
    reduced: Tensor | None = None


@dataclass(frozen=True)
class DeviationControl:
    """Whose deviation from the mean over frames each row takes at each temporal site.

    Args:
        row: int64 [sites, rows]; a row's own index is no injection.
        blend: [sites, rows], the share of the other row's deviation; 0 where not injected.
        region: [rows, frames, h, w] factor on the blend, or None.
        parts: [rows, 3], factor on the blend for q, k and v.
    """

    row: Tensor
    blend: Tensor
    parts: Tensor
    region: Tensor | None = None


@dataclass(frozen=True)
class MotionBank:
    """The motion embeddings of one temporal site, by slot; slot 0 is none.

    A site computes W (x + m) as W x + W m, so W m is kept; m itself is wanted only where a LoRA
    changes W from row to row, and by exported networks.

    Args:
        query_key: [slots, frames, channels], added to what is projected to q and k; None where
            there is no such part, or it is not wanted.
        value: [slots, frames, tokens, channels], added to what is projected to v; likewise.
        projected_query: `query_key` through the site's projection; None where there is none.
        projected_key: likewise.
        projected_value: `value` through the site's projection; None where there is none.
    """

    query_key: Tensor | None = None
    value: Tensor | None = None
    projected_query: Tensor | None = None
    projected_key: Tensor | None = None
    projected_value: Tensor | None = None


@dataclass(frozen=True)
class MotionControl:
    """Which motion embedding each row uses.

    Args:
        slot: int64 [rows]; 0 is none.
        scale: [rows], a factor on the embedding.
        banks: by index of the temporal site; sites that no motion of the batch has are not there.
    """

    slot: Tensor
    scale: Tensor
    banks: Mapping[int, MotionBank]


@dataclass(frozen=True)
class LoraBank:
    """The low-rank changes of one projection, by slot; slot 0 is none.

    Args:
        down: [slots, rank, channels in].
        up: [slots, channels out, rank].
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class LoraControl:
    """Which LoRA each row uses: y = W x + scale up (down x).

    Args:
        slot: int64 [rows]; 0 is none.
        scale: [rows].
        banks: by module path of the projection, of temporal transformers only.
    """

    slot: Tensor
    scale: Tensor
    banks: Mapping[str, LoraBank]


@dataclass(frozen=True)
class SkipControl:
    """Where each row's skip connections start, and their strength.

    Args:
        source: [skips, rows]; 0: behind the temporal transformer, 1: before it.
        gain: [skips, rows], a factor on what is skipped.
    """

    source: Tensor
    gain: Tensor


@dataclass(frozen=True)
class KeyValueBank:
    """Keys and values that rows of one spatial site may be given in place of their own, by slot.

    Args:
        key: [slots, frames, tokens, channels]; the first is slot 1, since slot 0 is a row's own.
        value: likewise.
    """

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class KeyValueControl:
    """Which given keys and values each row uses.

    Args:
        slot: int64 [rows]; 0 is the row's own.
        banks: by index of the spatial site; at sites that are not there every row uses its own.
    """

    slot: Tensor
    banks: Mapping[int, KeyValueBank]


@dataclass(frozen=True)
class SharedKeyControl:
    """Rows that see other rows' keys and values of the same frame at spatial sites.

    Args:
        readers: int64 [n], these rows.
        alone: int64, all the other rows of the batch.
        rows: int64 [n, others], as places in `readers`; a row's own place adds nothing.
        mask: [n, frames, h, w], how much a reader's places count for other rows beside their own,
            which count 1. Averaged over a key's area, its logarithm is added to the key's scores.
    """

    readers: Tensor
    alone: Tensor
    rows: Tensor
    mask: Tensor


@dataclass(frozen=True)
class PreserveControl:
    """Rows whose queries at spatial sites are those of other rows, before anything else acts.

    So an injection acts on a row as it does on the row whose queries it has.

    Args:
        readers: int64 [n], these rows.
        guides: int64 [n], the rows whose queries they have.
    """

    readers: Tensor
    guides: Tensor


@dataclass(frozen=True)
class FlowControl:
    """Rows whose queries at spatial sites are moved from key frames to the frames between.

    Args:
        readers: int64 [n], these rows.
        guides: int64 [n], the rows whose queries tell what is where in which frame; None where
            `matches` do.
        before: int64 [frames], the last key frame that is not after each frame.
        after: int64 [frames], the first that is not before it; a key frame's own is itself.
        share: [frames], of what comes from `before`; the rest comes from `after`.
        matches: by tokens of a site, int64 [n, 2, frames, tokens]: the token of `before` and that
            of `after` that shows what each token shows; None where `guides` tell.
    """

    readers: Tensor
    guides: Tensor | None
    before: Tensor
    after: Tensor
    share: Tensor
    matches: Mapping[int, Tensor] | None = None


@dataclass(frozen=True)
class PatchMatches:
    """What other clips show at each token of a site, and how much of it is taken over.

    Args:
        token: int64 [n, others, frames, tokens], in the same frame of the other clip.
        share: [n, others, frames, tokens], at most 1 in all.
    """

    token: Tensor
    share: Tensor


@dataclass(frozen=True)
class RefineControl:
    """Rows that take over outputs of spatial self-attention at matching patches of other rows.

    Args:
        readers: int64 [n], these rows.
        others: int64 [n, others], the rows that they take from.
        matches: by tokens of a site.
    """

    readers: Tensor
    others: Tensor
    matches: Mapping[int, PatchMatches]


@dataclass(frozen=True)
class ControlTensors:
    """The controls of one forward pass; None is a kind that no row uses.

    Flow and refinement have one entry a board of shots, whose rows have no others in common.
    """

    query: QueryControl | None = None
    deviation: DeviationControl | None = None
    motion: MotionControl | None = None
    lora: LoraControl | None = None
    skip: SkipControl | None = None
    key_value: KeyValueControl | None = None
    shared_key: SharedKeyControl | None = None
    preserve: PreserveControl | None = None
    flow: tuple[FlowControl, ...] = ()
    refine: tuple[RefineControl, ...] = ()


def at_site(mask: Tensor, tokens: int) -> Tensor:
    """A latent-sized mask [rows, frames, h, w] at a site's resolution, [rows, frames, tokens].

    The mask is averaged over the area of each token.
    """
    size = size_at(mask.shape[-2], mask.shape[-1], tokens)
    if size != tuple(mask.shape[-2:]):
        mask = F.interpolate(mask, size=size, mode="area")
    return mask.flatten(2)


def size_at(height: int, width: int, tokens: int) -> tuple[int, int]:
    """Height and width of a site's tokens, where the latents have `height` and `width`.

    The network halves the latents level by level, rounding up.
    """
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def no_injection(sites: int, rows: int) -> Tensor:
    """Row indices under which every row uses its own, int64 [sites, rows]."""
    return torch.arange(rows).repeat(sites, 1)
