"""The controls together: which there are, which compose, and what one clip's become."""

from collections.abc import Callable

import attrs

from kinetiq.errors import RequestError
from kinetiq.families import Site
from kinetiq.motion_injection import (
    MotionInjection,
    ResolvedMotionInjection,
    resolve_motion_injection,
)
from kinetiq.query_injection import (
    QueryInjection,
    ResolvedQueryInjection,
    resolve_query_injection,
)
from kinetiq.source import ResolvedSource, Source

Control = QueryInjection | MotionInjection


@attrs.frozen
class ResolvedControls:
    """All controls of one clip as data; None is a kind that it does not use."""

    query: ResolvedQueryInjection | None = None
    motion: ResolvedMotionInjection | None = None

    def active(self, step: int) -> "ResolvedControls":
        """The controls that act at `step`, counted from 0."""
        return ResolvedControls(
            self.query if self.query is not None and step < self.query.steps else None,
            self.motion if self.motion is not None and step < self.motion.steps else None,
        )


def resolve_controls(
    controls: tuple[Control, ...],
    encode: Callable[[Source], ResolvedSource],
    steps: int,
    sites: tuple[Site, ...],
) -> ResolvedControls:
    """Resolve the controls of one request.

    Args:
        controls: what was asked.
        encode: makes a source at the size of the request's clip.
        steps: sampler steps of the request.
        sites: the network's sites.

    Raises:
        RequestError: something is not a control, or two of a kind were asked for.
    """
    query, motion = None, None
    for control in controls:
        if isinstance(control, QueryInjection) and query is None:
            query = resolve_query_injection(control, encode(control.source), steps, sites)
        elif isinstance(control, MotionInjection) and motion is None:
            motion = resolve_motion_injection(control, encode(control.source), steps, sites)
        elif isinstance(control, QueryInjection | MotionInjection):
            raise RequestError(
                f"control: at most one {type(control).__name__} acts on a clip, got two; a row "
                "reads one source, so give each motion a clip of its own"
            )
        else:
            raise RequestError(
                f"control: must be QueryInjection or MotionInjection, got {type(control).__name__}"
            )
    return ResolvedControls(query, motion)
