"""The controls together: which there are, which compose, and what one clip's become."""

from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor

from kinetiq.errors import RequestError
from kinetiq.families import Site
from kinetiq.injection import Injection
from kinetiq.inversion import ResolvedNoise, resolve_noise
from kinetiq.moft_guidance import MoftGuidance, ResolvedMoftGuidance
from kinetiq.motion_embedding import MotionEmbedding, ResolvedMotionEmbedding
from kinetiq.motion_injection import (
    MotionInjection,
    ResolvedMotionInjection,
    resolve_motion_injection,
)
from kinetiq.motion_lora import MotionLora, ResolvedMotionLora
from kinetiq.query_injection import (
    QueryInjection,
    ResolvedQueryInjection,
    resolve_query_injection,
)
from kinetiq.source import ResolvedSource, Source

LearnedMotion = MotionEmbedding | MotionLora
Control = QueryInjection | MotionInjection | LearnedMotion | MoftGuidance
Learned = tuple[ResolvedMotionEmbedding | ResolvedMotionLora, ResolvedNoise | None]

_FIELDS: dict[type, str] = {  # of each kind of control: its field in `ResolvedControls`
    QueryInjection: "query",
    MotionInjection: "motion",
    MotionEmbedding: "embedding",
    MotionLora: "lora",
    MoftGuidance: "guidance",
}


@attrs.frozen
class ResolvedControls:
    """All controls of one clip as data; None is a kind that it does not use.

    `noise` acts once, in the initial noise; the others act at steps.
    """

    query: ResolvedQueryInjection | None = None
    motion: ResolvedMotionInjection | None = None
    embedding: ResolvedMotionEmbedding | None = None
    lora: ResolvedMotionLora | None = None
    guidance: ResolvedMoftGuidance | None = None
    noise: ResolvedNoise | None = None

    def active(self, step: int) -> "ResolvedControls":
        """The controls that act at `step`, counted from 0."""
        kinds = {name: getattr(self, name) for name in _FIELDS.values()}
        return ResolvedControls(
            **{name: c for name, c in kinds.items() if c is not None and _acts(c, step)}
        )


def _acts(control: Any, step: int) -> bool:
    if isinstance(control, ResolvedMoftGuidance):
        return control.acts(step)
    return bool(step < control.steps)  # the others act from the first step on


def resolve_controls(
    controls: tuple[Control, ...],
    encode: Callable[[Source], ResolvedSource],
    steps: int,
    sites: tuple[Site, ...],
    learned: Callable[[LearnedMotion], Learned] | None = None,
    guidance: Callable[[MoftGuidance], ResolvedMoftGuidance] | None = None,
    inverted: Callable[[Source], Tensor] | None = None,
) -> ResolvedControls:
    """Resolve the controls of one request.

    Args:
        controls: what was asked.
        encode: makes a source at the size of the request's clip.
        steps: sampler steps of the request.
        sites: the network's sites.
        learned: makes data of a learned motion, for the request's clip; None: there is no model
            to do it by.
        guidance: likewise of a guidance.
        inverted: likewise the noise [channels, frames, h, w] of a source.

    Raises:
        RequestError: something is not a control, two of a kind were asked for, or two bring noise.
        CheckpointError: a learned motion was made for another model.
    """
    resolved: dict[str, Any] = {}
    for control in controls:
        name = next((name for kind, name in _FIELDS.items() if isinstance(control, kind)), None)
        if name is None:
            *first, last = (kind.__name__ for kind in _FIELDS)
            raise RequestError(
                f"control: must be {', '.join(first)} or {last}, got {type(control).__name__}"
            )
        if name in resolved:
            raise RequestError(_two_of_a_kind(control))
        noise: ResolvedNoise | None = None
        if isinstance(control, QueryInjection):
            resolved[name] = resolve_query_injection(control, encode(control.source), steps, sites)
        elif isinstance(control, MotionInjection):
            resolved[name] = resolve_motion_injection(control, encode(control.source), steps, sites)
        elif isinstance(control, MoftGuidance):
            if guidance is None:
                raise RequestError("control: a guidance needs the model of an Engine, got none")
            resolved[name] = guidance(control)
        elif learned is None:
            raise RequestError("control: a learned motion needs the model of an Engine, got none")
        else:
            resolved[name], noise = learned(control)
        if isinstance(control, Injection) and control.noise_prior > 0.0:
            if inverted is None:
                raise RequestError("noise_prior: must be 0 without the model of an Engine")
            found = inverted(control.source)
            noise = resolve_noise(found, control.noise_prior, found.shape[1:])
        if noise is not None and "noise" in resolved:
            raise RequestError(
                "noise_prior: one control alone may bring its noise, since a clip starts from "
                "one, got two; set noise_prior=0 on one of them"
            )
        if noise is not None:
            resolved["noise"] = noise
    return ResolvedControls(**resolved)


def _two_of_a_kind(control: Control) -> str:
    asked = f"control: at most one {type(control).__name__} acts on a clip, got two; "
    if isinstance(control, LearnedMotion):
        return asked + "add them up: m1 + m2"
    if isinstance(control, MoftGuidance):
        return asked + "several motions are regions of one: MoftGuidance(regions=...)"
    return asked + "a row reads one source, so give each motion a clip of its own"
