"""Motion injection: a clip keeps what it shows and takes how the reference changes.

At the temporal self-attention of the first `until` of the steps, q, k and v of a clip's rows
become their own mean over frames plus the *source row's deviation from its mean* over frames:

    x' = mean_F(x_clip) + b (x_source - mean_F(x_source)) + (1 - b) (x_clip - mean_F(x_clip))

with b the blend. The mean carries what the clip shows, the deviation how it moves. It needs no
training, no inversion and no gradient, and costs the same one source row as query injection.

Source: this project's own; it joins the source row of query injection (arXiv:2412.07750, sec. 3)
with the removal of the mean over frames of MOFT (arXiv:2405.14864, sec. 3.2).
"""

import attrs
from torch import Tensor

from kinetiq.errors import RequestError
from kinetiq.families import Site, SiteKind, select_sites
from kinetiq.injection import (
    Injection,
    check_share,
    freeze_sites,
    injected_steps,
    resolve_region,
    source_step,
)
from kinetiq.kernels.frame_attention import PARTS
from kinetiq.source import ResolvedSource


@attrs.frozen(kw_only=True)
class MotionInjection(Injection):
    """Take the deviations over frames of a reference; see `Injection` for the other options.

    Args:
        parts: which of q, k and v are injected: "qkv", "qk", "v", ...
        blend: share of the reference's deviation; 1 replaces the clip's own.
        sites: "temporal", or names of temporal sites or blocks.
    """

    parts: str = attrs.field(default="qkv")
    blend: float = attrs.field(default=1.0, validator=check_share)
    sites: str | tuple[str, ...] = attrs.field(default="temporal", converter=freeze_sites)

    @parts.validator
    def _check_parts(self, _: object, value: object) -> None:
        letters = value if isinstance(value, str) else ""
        if not letters or not set(letters) <= set(PARTS) or len(set(letters)) != len(letters):
            raise RequestError(f"parts: must be letters among q, k and v, got {value!r}")


@attrs.frozen(eq=False)
class ResolvedMotionInjection:
    """Motion injection as data for one clip.

    Args:
        source: the source row.
        steps: how many steps are injected, from the first.
        source_step: the step whose noise the source row never exceeds.
        sites: bool for each site of the network.
        conditional_only: whether the unconditional row keeps its own deviations.
        blend: share of the source's deviation.
        region: [frames, h, w] factor on the blend, or None.
        parts: factor on the blend for q, k and v.
    """

    source: ResolvedSource
    steps: int
    source_step: int
    sites: tuple[bool, ...]
    conditional_only: bool
    blend: float
    region: Tensor | None
    parts: tuple[float, float, float]


def resolve_motion_injection(
    control: MotionInjection,
    source: ResolvedSource,
    steps: int,
    sites: tuple[Site, ...],
) -> ResolvedMotionInjection:
    """Turn what was asked into data, for a clip of the source's size sampled in `steps` steps.

    Raises:
        RequestError: a chosen site is not temporal.
    """
    chosen = select_sites(sites, control.sites)
    if not isinstance(control.sites, str):  # a block's name stands for its temporal sites
        temporal = [site.kind is SiteKind.TEMPORAL for site in sites]
        chosen = tuple(a and b for a, b in zip(chosen, temporal, strict=True))
    wrong = [
        site.name
        for site, use in zip(sites, chosen, strict=True)
        if use and site.kind is not SiteKind.TEMPORAL
    ]
    if wrong or not any(chosen):
        raise RequestError(
            "sites: motion injection acts at temporal sites, got "
            f"{control.sites!r}; query injection has spatial ones"
        )
    return ResolvedMotionInjection(
        source=source,
        steps=injected_steps(control.until, steps),
        source_step=source_step(control.source_from, steps),
        sites=chosen,
        conditional_only=control.halves == "cond",
        blend=control.blend,
        region=resolve_region(control.region, source.latents.shape[1:]),
        parts=tuple(float(part in control.parts) for part in PARTS),  # type: ignore[arg-type]
    )
