"""Query injection: a clip looks at itself through the reference's eyes.

For the first `until` of the steps, the queries of the spatial self-attention of a clip's rows are
those of the source row (`kinetiq.source`); keys and values stay the clip's own. Early steps fix
where things are and how they move, late steps what they look like, so `until` trades motion
against the reference's identity leaking in.

Source: "Motion by Queries: Identity-Motion Trade-offs in Text-to-Video Generation",
arXiv:2412.07750, sec. 3.
"""

import attrs
from torch import Tensor

from kinetiq.families import Site, select_sites
from kinetiq.injection import (
    Injection,
    check_share,
    freeze_sites,
    injected_steps,
    resolve_region,
    source_step,
)
from kinetiq.source import ResolvedSource


@attrs.frozen(kw_only=True)
class QueryInjection(Injection):
    """Take the queries of a reference clip; see `Injection` for the options not listed here.

    Args:
        until: share of the steps that are injected, from the first, 0 to 1.
        sites: "spatial" (the paper), "temporal", "both", or names of sites or blocks.
        alpha: share of the reference's queries; 1 replaces the clip's own.
        reduce_leak: keep the clip's own mean of the queries over frames, and take only the
            reference's deviation from its mean.
    """

    until: float = attrs.field(default=0.4, validator=check_share)
    sites: str | tuple[str, ...] = attrs.field(default="spatial", converter=freeze_sites)
    alpha: float = attrs.field(default=1.0, validator=check_share)
    reduce_leak: bool = False


@attrs.frozen(eq=False)
class ResolvedQueryInjection:
    """Query injection as data for one clip.

    Args:
        source: the source row.
        steps: how many steps are injected, from the first.
        source_step: the step whose noise the source row never exceeds.
        sites: bool for each site of the network.
        conditional_only: whether the unconditional row keeps its own queries.
        blend: a number, or [frames, h, w] for a region.
        reduced: whether the clip's own mean over frames is kept.
    """

    source: ResolvedSource
    steps: int
    source_step: int
    sites: tuple[bool, ...]
    conditional_only: bool
    blend: float | Tensor
    reduced: bool


def resolve_query_injection(
    control: QueryInjection,
    source: ResolvedSource,
    steps: int,
    sites: tuple[Site, ...],
) -> ResolvedQueryInjection:
    """Turn what was asked into data, for a clip of the source's size sampled in `steps` steps."""
    region = resolve_region(control.region, source.latents.shape[1:])
    return ResolvedQueryInjection(
        source=source,
        steps=injected_steps(control.until, steps),
        source_step=source_step(control.source_from, steps),
        sites=select_sites(sites, control.sites),
        conditional_only=control.halves == "cond",
        blend=control.alpha if region is None else control.alpha * region,
        reduced=control.reduce_leak,
    )
