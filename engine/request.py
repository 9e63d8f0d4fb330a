"""What a user asks for, and what it becomes: asked, then resolved.

A `Request` is what the user said. A `ResolvedRequest` has nothing optional left: defaults of the
checkpoint are filled in, controls are resolved to data, and every value is checked.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import attrs

from kinetiq.errors import RequestError
from kinetiq.injection import check_text

if TYPE_CHECKING:
    from kinetiq.controls import Control, ResolvedControls
    from kinetiq.sampler import SamplerTable

MAX_STEPS = 1000
MAX_FRAMES = 1024
MAX_SIZE = 4096


def _whole(low: int, high: int) -> Any:
    def check(_: Any, attribute: Any, value: Any) -> None:
        if value is None and attribute.default is None:
            return
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise RequestError(
                f"{attribute.name}: must be a whole number from {low} to {high}, got {value!r}"
            )

    return check


def _number(low: float, high: float) -> Any:
    def check(_: Any, attribute: Any, value: Any) -> None:
        if value is None and attribute.default is None:
            return
        fits = isinstance(value, Real) and not isinstance(value, bool)
        if not fits or not math.isfinite(value) or not low <= value <= high:
            raise RequestError(
                f"{attribute.name}: must be a number from {low:g} to {high:g}, got {value!r}"
            )

    return check


def _words(_: Any, attribute: Any, value: Any) -> None:
    check_text(None, attribute, value)
    if attribute.name == "prompt" and not value.strip():
        raise RequestError("prompt: must hold at least one word, got an empty one")


def _controls(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) else (value,)


@attrs.frozen
class Request:
    """One clip to generate. What is None is the checkpoint's default.

    Args:
        prompt: what the clip shows.
        control: a control, or several that compose, or None for plain generation.
        seed: of the initial noise and of the sampler's noise.
        negative_prompt: what the clip does not show, the other half of guidance.
        steps: sampler steps.
        guidance_scale: 1 is no guidance, and halves the work.
        frames: frames of the clip.
        height: pixels.
        width: pixels.
        fps: frames a second of the clip that is written.
        sampler: "ddim", "ddpm", "euler", "dpm++2m" or "lcm"; its noise schedule stays the
            checkpoint's.
        eta: noise of DDIM, 0 to 1.
    """

    prompt: str = attrs.field(validator=_words)
    control: "Control | Sequence[Control] | None" = attrs.field(default=None, converter=_controls)
    seed: int = attrs.field(default=0, kw_only=True, validator=_whole(0, 2**63 - 1))
    negative_prompt: str = attrs.field(default="", kw_only=True, validator=_words)
    steps: int | None = attrs.field(default=None, kw_only=True, validator=_whole(1, MAX_STEPS))
    guidance_scale: float | None = attrs.field(
        default=None, kw_only=True, validator=_number(1.0, 100.0)
    )
    frames: int | None = attrs.field(default=None, kw_only=True, validator=_whole(1, MAX_FRAMES))
    height: int | None = attrs.field(default=None, kw_only=True, validator=_whole(8, MAX_SIZE))
    width: int | None = attrs.field(default=None, kw_only=True, validator=_whole(8, MAX_SIZE))
    fps: float | None = attrs.field(default=None, kw_only=True, validator=_number(0.1, 240.0))
    sampler: str | None = attrs.field(default=None, kw_only=True)
    eta: float = attrs.field(default=0.0, kw_only=True, validator=_number(0.0, 1.0))

    @classmethod
    def from_options(cls, prompt: str, options: Mapping[str, Any]) -> "Request":
        """A request from keyword options.

        Raises:
            RequestError: an option is unknown or out of range.
        """
        known = [field.name for field in attrs.fields(cls) if field.name != "prompt"]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise RequestError(
                    f"request: options must be among {', '.join(known)}, got {name!r}{hint}"
                )
        return cls(prompt, **options)


@attrs.frozen
class ResolvedRequest:
    """A request with nothing optional left, ready to run on one checkpoint."""

    prompt: str
    negative_prompt: str
    seed: int
    guidance_scale: float
    frames: int
    latent_height: int
    latent_width: int
    fps: float
    sampler: "SamplerTable"
    controls: "ResolvedControls"

    @property
    def guided(self) -> bool:
        """Whether an unconditional row is needed."""
        return self.guidance_scale != 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """What clips of one batch have in common: frames, latent height, latent width."""
        return self.frames, self.latent_height, self.latent_width
