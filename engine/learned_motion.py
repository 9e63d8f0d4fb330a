"""What all learned motions have in common: switches, equality, and arithmetic."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, ClassVar, Self, TypeVar

import attrs
import torch
from torch import Tensor

from kinetiq.errors import CheckpointError, InputError, RequestError
from kinetiq.motion_file import MotionInfo


class MotionArithmetic(ABC):
    """Equality, and the motions `a * m`, `-m`, `m1 + m2` and `m1 - m2`.

    For frozen attrs classes, whose fields behind `info` are the switches.
    """

    __slots__ = ()

    _FACTOR_MUST: ClassVar[str]  # what is said of a factor that is not finite
    _NOISE_PRIOR: ClassVar[float]  # the share of noise where none is chosen

    @property
    @abstractmethod
    def noise(self) -> Tensor | None:
        """The reference's own noise, or None."""

    @property
    @abstractmethod
    def noise_prior(self) -> float | None:
        """The chosen share of that noise in a clip's first noise; None: that of the kind."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """Factor on the motion, not on the noise."""

    @property
    @abstractmethod
    def until(self) -> float:
        """Share of the steps that it acts in."""

    @property
    @abstractmethod
    def info(self) -> MotionInfo:
        """What the motion was learned from."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What motions of equal tensors have in common; no switch enters."""

    @abstractmethod
    def _times(self, factor: float, left: Mapping[str, Any]) -> Self:
        """The motion times a finite number, with the `noise` and `noise_prior` that are left."""

    @abstractmethod
    def _plus(self, other: Self) -> Self:
        """The sum with another motion of this kind."""

    @property
    def noise_share(self) -> float:
        """Share of its noise that a clip starts from.

        0 where it has no noise, never acts, or is reversed by a negative scale.
        """
        if self.noise is None or self.until == 0 or self.scale < 0:
            return 0.0
        return self._NOISE_PRIOR if self.noise_prior is None else float(self.noise_prior)

    def _require_noise(self) -> None:
        """Raise if a share of noise is chosen, and there is none to take.

        Raises:
            RequestError: it is so.
        """
        if not self.noise_prior:
            return
        asked = "noise_prior: must be 0 or left out where"
        if self.noise is None:
            raise RequestError(
                f"{asked} a motion has no noise of its reference, got {self.noise_prior!r}; what "
                "is converted from a public file, learned from several clips or reversed has none"
            )
        if self.scale < 0:
            raise RequestError(
                f"{asked} scale is negative, got {self.noise_prior!r} with scale {self.scale!r}; "
                "the noise shows the motion, and not its reverse"
            )

    @property
    def _identity(self) -> tuple[Any, ...]:
        switches = (getattr(self, name) for name in switch_names(type(self)))
        return (self.fingerprint, self.info, *switches)

    def __eq__(self, other: object) -> bool:
        """Whether content, origin and switches are the same."""
        if not isinstance(other, type(self)):
            return NotImplemented
        return self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __mul__(self, factor: object) -> Self:
        """The motion times a number; its noise stays if `factor` is positive."""
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        amount = float(factor)
        if not math.isfinite(amount):
            raise RequestError(f"{self._FACTOR_MUST}, got {amount!r}")
        if self.noise is None or amount <= 0:
            return self._times(amount, {"noise": None, "noise_prior": None})
        return self._times(amount, {"noise": amount * self.noise, "noise_prior": self.noise_prior})

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        """The motion reversed, without its noise."""
        return self * -1.0

    def __add__(self, other: Self) -> Self:
        """Both motions at once."""
        if not isinstance(other, type(self)):
            return NotImplemented
        return self._plus(other)

    def __sub__(self, other: Self) -> Self:
        """This motion and the reverse of the other."""
        if not isinstance(other, type(self)):
            return NotImplemented
        return self + (-other)


def switch_names(motion: type) -> list[str]:
    """What can be chosen when a motion is read: the options behind `info`."""
    names = [field.name for field in attrs.fields(motion)]
    return names[names.index("info") + 1 :]


def check_switches(motion: type, switches: Mapping[str, Any]) -> None:
    """Raise unless all switches are known and in range.

    Raises:
        RequestError: one is not.
    """
    known = switch_names(motion)
    fields: dict[str, Any] = dict(attrs.fields_dict(motion))
    for name, value in switches.items():
        if name not in known:
            raise RequestError(
                f"{motion.__name__}: switches must be among {', '.join(known)}, got {name!r}"
            )
        fields[name].validator(None, fields[name], value)


_Motion = TypeVar("_Motion", bound=MotionArithmetic)


def use_with(motion: _Motion, **switches: Any) -> _Motion:
    """The motion with these switches.

    Others that they leave without a meaning are no longer chosen: the strength of a highway that
    is taken away, the share of noise of a motion that is reversed, the factor on a value part that
    is dropped.

    Raises:
        RequestError: a switch is unknown or out of range, or two of these contradict each other.
    """
    check_switches(type(motion), switches)
    left: dict[str, Any] = {}
    if switches.get("highway", "") is None:
        left["beta"] = None
    if switches.get("scale", 0.0) < 0:
        left["noise_prior"] = None
    if switches.get("debias") == "drop":
        left["value_scale"] = 1.0
    return attrs.evolve(motion, **(left | switches))  # type: ignore[misc]  # it is an attrs class


def chosen_switches(motion: MotionArithmetic) -> dict[str, str | float | None]:
    """The switches of a motion that are not the default, as JSON can say them."""
    defaults = default_switches(type(motion))
    values = {name: getattr(motion, name) for name in defaults}
    return {
        name: float(value) if isinstance(value, Real) else value
        for name, value in values.items()
        if value != defaults[name]
    }


def default_switches(motion: type) -> dict[str, Any]:
    """The switches of a kind of motion, as they are where nothing is chosen."""
    names = switch_names(motion)
    return {field.name: field.default for field in attrs.fields(motion) if field.name in names}


@contextmanager
def said_of(where: str) -> Iterator[None]:
    """Say of a file what is wrong with the motion that is made of it.

    Raises:
        CheckpointError: in the place of another error about what was given.
    """
    try:
        yield
    except InputError as error:
        raise CheckpointError(f"{where}: {error}") from error


def join_noise_prior(first: MotionArithmetic, second: MotionArithmetic) -> float | None:
    """The share of noise of a sum: that of the terms that have any.

    Raises:
        RequestError: both have, and other shares were chosen.
    """
    said = [motion.noise_prior for motion in (first, second) if motion.noise is not None]
    if len(set(said)) > 1:
        raise RequestError(
            f"motion: both of a sum must have the same noise_prior, got {said[0]!r} and {said[1]!r}"
        )
    return said[0] if said else None


def join_info(first: MotionInfo, second: MotionInfo) -> MotionInfo:
    """What a sum of motions says of itself: what both say, and nothing where they differ."""
    nothing: dict[str, Any] = {
        "checkpoint": "",
        "loss": "",
        "steps": 0,
        "prompt": "",
        "reference": "",
    }
    differing = {n: v for n, v in nothing.items() if getattr(first, n) != getattr(second, n)}
    return attrs.evolve(first, **differing)


def check_factor(_: object, attribute: Any, value: object) -> None:
    """Require a finite number; an attrs validator."""
    fits = isinstance(value, Real) and not isinstance(value, bool)
    if not fits or not math.isfinite(value):  # type: ignore[arg-type]
        raise RequestError(f"{attribute.name}: must be a finite number, got {value!r}")


def optional(check: Any) -> Any:
    """Let None pass an attrs validator."""

    def check_chosen(motion: object, attribute: Any, value: object) -> None:
        if value is not None:
            check(motion, attribute, value)

    return check_chosen


def check_word(*words: str) -> Any:
    """Require one of these words; makes an attrs validator."""

    def check(_: object, attribute: Any, value: object) -> None:
        if value not in words:
            raise RequestError(
                f"{attribute.name}: must be one of {', '.join(map(repr, words))}, got {value!r}"
            )

    return check


def freeze_tensor(value: Any) -> Any:
    """Copy a tensor to the CPU in float32, so that a motion cannot change; an attrs converter."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


def freeze_tensors(value: Any) -> Any:
    """Like `freeze_tensor`, for tensors by name; an attrs converter."""
    if not isinstance(value, Mapping) or not all(isinstance(t, Tensor) for t in value.values()):
        raise RequestError(f"motion: must hold tensors by name, got {type(value).__name__}")
    return {name: freeze_tensor(tensor) for name, tensor in value.items()}
