"""The controls together: which there are, which compose, and what one clip's become."""

from collections.abc import Callable

import attrs

from kinetiq.errors import RequestError
from kinetiq.families import Site
from kinetiq.motion_embedding import ResolvedMotionEmbedding
from kinetiq.motion_injection import (
    MotionInjection,
    ResolvedMotionInjection,
    resolve_motion_injection,
)
from kinetiq.motion_lora import ResolvedMotionLora
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
    embedding: ResolvedMotionEmbedding | None = None
    lora: ResolvedMotionLora | None = None

    def active(self, step: int) -> "ResolvedControls":
        """The controls that act at `step`, counted from 0."""
        kinds = {field.name: getattr(self, field.name) for field in attrs.fields(type(self))}
        return ResolvedControls(
            **{name: None if c is None or step >= c.steps else c for name, c in kinds.items()}
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
