"""What query injection and motion injection share: the reference's row and where it is read."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from kinetiq.clip import Clip
from kinetiq.errors import RequestError
from kinetiq.source import Source


def check_share(_: object, attribute: Any, value: object) -> None:
    """Require a number from 0 to 1; an attrs validator."""
    fits = isinstance(value, Real) and not isinstance(value, bool)
    if not fits or not 0.0 <= value <= 1.0:  # type: ignore[operator]
        raise RequestError(f"{attribute.name}: must be a number from 0 to 1, got {value!r}")


def freeze_sites(value: str | Sequence[str]) -> str | tuple[str, ...]:
    """Keep a word, freeze a list of site names; an attrs converter."""
    if isinstance(value, str):
        return value
    fits = isinstance(value, Sequence) and len(value) > 0  # type: ignore[redundant-expr]
    if not fits or not all(isinstance(name, str) for name in value):
        raise RequestError(f"sites: must be a word or a list of site names, got {value!r}")
    return tuple(value)


def check_reference(_: object, __: object, value: Any) -> None:
    """Require a clip that can hold motion; an attrs validator."""
    if not isinstance(value, Clip):
        raise RequestError(
            f"reference: must be a Clip, got {type(value).__name__}; read a file with Clip.read"
        )
    if value.num_frames < 2:
        raise RequestError("reference: must have at least 2 frames to hold motion, got 1")


def check_text(_: object, attribute: Any, value: object) -> None:
    """Require text that can be encoded; an attrs validator."""
    if not isinstance(value, str):
        raise RequestError(f"{attribute.name}: must be text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{attribute.name}: must be valid Unicode, got {value!r}") from error


def _check_prompt(instance: object, attribute: Any, value: object) -> None:
    if value is not None:
        check_text(instance, attribute, value)


def freeze_region(value: Any) -> Any:
    """Copy a mask, so that what was asked cannot change; an attrs converter."""
    if value is None:
        return None
    try:
        mask = np.array(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"region: must be an array of numbers, got {type(value).__name__}: {error}"
        ) from error
    mask.flags.writeable = False
    return mask


def _check_seed(_: object, attribute: Any, value: object) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and (not fits or not 0 <= value < 2**63):  # type: ignore[operator]
        raise RequestError(
            f"{attribute.name}: must be None or a whole number from 0 to {2**63 - 1}, got {value!r}"
        )


def one_of(*words: str) -> Any:
    """Require one of these words; makes an attrs validator."""

    def check(_: object, attribute: Any, value: object) -> None:
        if value not in words:
            choice = " or ".join(map(repr, words))
            raise RequestError(f"{attribute.name}: must be {choice}, got {value!r}")

    return check


@attrs.frozen(kw_only=True)
class Injection:
    """Base of the controls that read a source row.

    Args:
        reference: the clip whose motion is wanted.
        until: share of the steps that are injected, from the first, 0 to 1.
        halves: "both" halves of guidance, or "cond" alone.
        region: bool or float mask [height, width] or [frames, height, width] of any size, 1 where
            the motion is wanted; None: everywhere.
        source_prompt: conditions the source row; "" says nothing, None is the clip's own prompt:
            the reference is then seen as what the clip is to show, and takes less of its looks
            along, but clips with other prompts cannot share its row.
        source_noise: "shared" by all steps, or "fresh" at each.
        source_seed: of that noise; None: derived from the reference.
        source_from: share of the steps, 0 to 1; until then the source row is no noisier than it
            will be there. At 0 it is as noisy as its readers, and in the first steps, where the
            motion is decided, shows hardly any of its own.
        noise_prior: share of the reference's inverted noise (DDIM, `kinetiq.inversion`) in the
            clip's initial noise, 0 to 1. That noise has the reference's motion in it before
            anything is injected; finding it costs as much as a guided clip of 25 steps, once for
            a reference and a size. It is the reference's own, whatever `source_seed` says.
    """

    reference: Clip = attrs.field(kw_only=False, validator=check_reference)
    until: float = attrs.field(default=1.0, validator=check_share)
    halves: str = attrs.field(default="both", validator=one_of("both", "cond"))
    region: Any = attrs.field(
        default=None,
        converter=freeze_region,
        eq=attrs.cmp_using(eq=np.array_equal),
        hash=False,  # an array has none; equal controls still have equal hashes
    )
    source_prompt: str | None = attrs.field(default="", validator=_check_prompt)
    source_noise: str = attrs.field(default="shared", validator=one_of("shared", "fresh"))
    source_seed: int | None = attrs.field(default=None, validator=_check_seed)
    source_from: float = attrs.field(default=0.0, validator=check_share)
    noise_prior: float = attrs.field(default=0.0, validator=check_share)

    @property
    def source(self) -> Source:
        """How the reference becomes a row."""
        return Source(
            self.reference, self.source_prompt, self.source_noise == "fresh", self.source_seed
        )


def injected_steps(until: float, steps: int) -> int:
    """How many of `steps` are injected; any `until` above 0 injects at least the first."""
    return 0 if until == 0 else max(1, round(until * steps))


def source_step(source_from: float, steps: int) -> int:
    """The step, counted from 0, whose noise the source row never exceeds."""
    return min(round(source_from * steps), steps - 1)


def resolve_region(region: Any, shape: Sequence[int]) -> Tensor | None:
    """A region mask at the latents' size [frames, h, w], averaged over the area of each latent.

    Raises:
        RequestError: the mask has another rank or frame count, is empty, or is out of [0, 1].
    """
    if region is None:
        return None
    mask = torch.tensor(region)
    frames, height, width = shape
    if mask.ndim == 2:
        mask = mask.expand(frames, *mask.shape)
    if mask.ndim != 3 or mask.shape[0] != frames:
        raise RequestError(
            f"region: must be [height, width] or [frames = {frames}, height, width], "
            f"got {list(np.shape(region))}"
        )
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise RequestError("region: must hold numbers from 0 to 1, got others")
    if not bool(mask.any()):
        raise RequestError("region: must hold at least one place where motion is wanted, got none")
    return torch.nn.functional.interpolate(mask[None], size=(height, width), mode="area")[0]
