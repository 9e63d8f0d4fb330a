"""How each supported architecture names its attention sites.

A site is one attention module of the network, named by its module path. Sites are listed in the
order of the network's modules, and controls address them by their index in that list.
"""

import difflib
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from kinetiq.errors import CheckpointError, RequestError


class SiteKind(StrEnum):
    """What an attention module attends to."""

    SPATIAL = "spatial"  # the tokens of its own frame
    CROSS = "cross"  # the prompt
    TEMPORAL = "temporal"  # its own position in all frames


@dataclass(frozen=True)
class Site:
    """One attention module of a network.

    Args:
        name: module path, such as "up_blocks.1.attentions.0.transformer_blocks.0.attn1".
        kind: what it attends to.
        place: "in", "down", "mid" or "up".
        width: channels.
    """

    name: str
    kind: SiteKind
    place: str
    width: int


@dataclass(frozen=True)
class Family:
    """One denoiser architecture.

    Args:
        name: short name.
        network: class name of the diffusers network.
        temporal_folders: names of the module lists (or modules) that hold temporal transformers.
        noise_frames_first: whether the stock pipeline draws the sampler's noise as
            [frames, channels, h, w] instead of [channels, frames, h, w].
        frames: frames of a clip by default.
        steps: sampler steps by default.
        guidance_scale: guidance by default.
        fps: frames a second by default.
    """

    name: str
    network: str
    temporal_folders: tuple[str, ...]
    noise_frames_first: bool
    frames: int
    steps: int
    guidance_scale: float
    fps: float


ANIMATEDIFF = Family(
    name="animatediff",
    network="UNetMotionModel",
    temporal_folders=("motion_modules",),
    noise_frames_first=False,
    frames=16,
    steps=25,
    guidance_scale=7.5,
    fps=8.0,
)
UNET3D = Family(
    name="unet3d",
    network="UNet3DConditionModel",
    temporal_folders=("temp_attentions", "transformer_in"),
    noise_frames_first=True,
    frames=24,
    steps=50,
    guidance_scale=9.0,
    fps=8.0,
)
FAMILIES = {family.name: family for family in (ANIMATEDIFF, UNET3D)}


def detect_family(network: nn.Module) -> Family:
    """The family of a loaded network.

    Raises:
        CheckpointError: no supported family has this network.
    """
    for family in FAMILIES.values():
        if type(network).__name__ == family.network:
            return family
    supported = ", ".join(f"{family.network} ({family.name})" for family in FAMILIES.values())
    raise CheckpointError(
        f"detect_family: the network must be one of {supported}, got {type(network).__name__}"
    )


def temporal_transformers(network: nn.Module, family: Family) -> list[str]:
    """Module paths of the temporal transformers, in the order of the network's modules."""
    return [
        name
        for name, module in network.named_modules()
        if hasattr(module, "transformer_blocks") and _is_temporal(name, family)
    ]


def list_sites(network: nn.Module, family: Family) -> tuple[Site, ...]:
    """All attention sites of a network."""
    sites = []
    for name, module in network.named_modules():
        if not (hasattr(module, "to_q") and hasattr(module, "to_out")):
            continue
        if _is_temporal(name, family):
            kind = SiteKind.TEMPORAL
        elif name.endswith("attn1"):
            kind = SiteKind.SPATIAL
        else:
            kind = SiteKind.CROSS
        sites.append(Site(name, kind, _place(name), module.to_q.in_features))
    return tuple(sites)


def select_sites(sites: tuple[Site, ...], wanted: str | tuple[str, ...]) -> tuple[bool, ...]:
    """Which sites a control uses: "spatial", "temporal", "both", or site names.

    A name may be the beginning of several sites' names ("up_blocks.1" is all of that block).

    Raises:
        RequestError: a name fits no spatial or temporal site.
    """
    eligible = [site.kind is not SiteKind.CROSS for site in sites]
    if isinstance(wanted, str) and wanted in ("spatial", "temporal"):
        return tuple(site.kind == wanted for site in sites)
    if isinstance(wanted, str) and wanted == "both":
        return tuple(eligible)
    names = (wanted,) if isinstance(wanted, str) else wanted
    chosen = [False] * len(sites)
    for name in names:
        hits = [
            index
            for index, site in enumerate(sites)
            if eligible[index] and (site.name == name or site.name.startswith(name + "."))
        ]
        if not hits:
            known = [site.name for site, fit in zip(sites, eligible, strict=True) if fit]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise RequestError(
                f"sites: must be 'spatial', 'temporal', 'both' or names of sites, got {name!r}; "
                f"this network has {len(known)}, such as {', '.join(near)}"
            )
        for index in hits:
            chosen[index] = True
    return tuple(chosen)


def _is_temporal(name: str, family: Family) -> bool:
    return any(part in family.temporal_folders for part in name.split("."))


def _place(name: str) -> str:
    head = name.partition(".")[0]
    return {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}.get(head, "in")
