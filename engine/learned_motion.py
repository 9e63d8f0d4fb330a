"""What all learned motions have in common: switches, equality, and arithmetic."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar, Self

import attrs
import torch
from torch import Tensor

from kinetiq.errors import RequestError
from kinetiq.motion_file import MotionInfo


class MotionArithmetic(ABC):
    """Equality, and the motions `a * m`, `-m`, `m1 + m2` and `m1 - m2`.

    For frozen attrs classes, whose fields behind `info` are the switches.
    """

    __slots__ = ()

    _FACTOR_MUST: ClassVar[str]  # what is said of a factor that is not finite

    @property
    @abstractmethod
    def noise(self) -> Tensor | None:
        """The reference's own noise, or None."""

    @property
    @abstractmethod
    def info(self) -> MotionInfo:
        """What the motion was learned from."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What motions of equal tensors have in common; no switch enters."""

    @abstractmethod
    def _times(self, factor: float, noise: Tensor | None) -> Self:
        """The motion times a finite number, with the noise that is left."""

    @abstractmethod
    def _plus(self, other: Self) -> Self:
        """The sum with another motion of this kind."""

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
        noise = amount * self.noise if self.noise is not None and amount > 0 else None
        return self._times(amount, noise)

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
