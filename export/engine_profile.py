"""The sizes that an engine is built for: the least, the best and the most of every named axis."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from kinetiq.errors import RequestError, ShapeError
from kinetiq.export.metadata import NetworkMetadata, TensorInfo, level_tokens

TOGETHER = 32
"""Frames that one program of our kernels can hold, which moving deviations takes."""

_MOST = 2**31 - 1  # of an axis, as the builders take them
_TOKENS = re.compile(r"(motion_)?tokens_(\d+)")


class Bounds(NamedTuple):
    """What an axis may be, and what it is best at.

    Attributes:
        least: the smallest.
        best: what kernels are chosen for.
        most: the largest.
    """

    least: int
    best: int
    most: int

    @classmethod
    def parse(cls, text: str, name: str) -> Self:
        """Bounds from "least:best:most", or from one number for all three.

        Raises:
            RequestError: it is neither, or they are not in order.
        """
        numbers = text.split(":")
        if len(numbers) not in (1, 3) or not all(
            re.fullmatch("[0-9]{1,10}", number) for number in numbers
        ):
            raise RequestError(
                f"profile: {name} must be a number or least:best:most, such as 1:2:4, got {text!r}"
            )
        bounds = cls(*map(int, numbers if len(numbers) == 3 else numbers * 3))
        bounds.check(name)
        return bounds

    def check(self, name: str) -> None:
        """Require 1 <= least <= best <= most, and no more than 32 bits hold.

        Raises:
            RequestError: that is not so.
        """
        if not 1 <= self.least <= self.best <= self.most <= _MOST:
            raise RequestError(
                f"profile: {name} must be 1 <= least <= best <= most <= {_MOST}, got {tuple(self)}"
            )

    def __str__(self) -> str:
        return f"{self.least} to {self.most}"


@dataclass(frozen=True)
class Profile:
    """Bounds of every named axis of a network's inputs.

    Args:
        bounds: by name of the axis.
    """

    bounds: Mapping[str, Bounds]

    def shapes(self, tensor: TensorInfo) -> tuple[list[int], list[int], list[int]]:
        """The least, the best and the largest shape of an input."""
        ends = [
            self.bounds[axis] if isinstance(axis, str) else Bounds(axis, axis, axis)
            for axis in tensor.axes
        ]
        return [e.least for e in ends], [e.best for e in ends], [e.most for e in ends]

    def check(self, tensor: TensorInfo, shape: tuple[int, ...]) -> None:
        """Require a shape inside the bounds.

        Raises:
            ShapeError: it is not; the message has the bounds.
        """
        least, _, most = self.shapes(tensor)
        inside = len(shape) == len(least) and all(
            low <= length <= high for low, length, high in zip(least, shape, most, strict=True)
        )
        if not inside:
            axes = ", ".join(
                f"{axis} {self.bounds[axis]}" if isinstance(axis, str) else str(axis)
                for axis in tensor.axes
            )
            raise ShapeError(
                f"engine: {tensor.name} must be [{axes}] as in the engine's profile, got "
                f"{list(shape)}; build an engine with a wider profile"
            )


def make_profile(metadata: NetworkMetadata, asked: Mapping[str, Bounds]) -> Profile:
    """The profile of a network, from bounds of some axes.

    What is not asked for: 1 to 4 rows, best at 2; a slot for each row and the one of those without
    a motion, and ranks up to 64, best at 1, since controls that are not used have one slot; the
    family's frames and up to twice as many, but no more than `TOGETHER` or than the network knows
    positions of; latents of 1 to 12 times what the network halves them to, best at 8.

    Args:
        metadata: of the network.
        asked: by name of the axis. The numbers of tokens follow from height and width.

    Raises:
        RequestError: an axis is not known, or its bounds have no meaning.
    """
    multiple, frames = metadata.multiple, metadata.family_of().frames
    side = Bounds(multiple, 8 * multiple, 12 * multiple)
    rows = asked.get("rows", Bounds(1, 2, 4))
    slots = Bounds(1, 1, rows.most + 1)
    longest = max(frames, min(2 * frames, TOGETHER))
    positions = longest if metadata.positions is None else metadata.positions
    usual = {
        "rows": rows,
        "frames": Bounds(1, min(frames, positions), min(longest, positions)),
        "height": side,
        "width": side,
        "text_tokens": Bounds(1, 77, 77),
        "motion_slots": slots,
        "lora_slots": slots,
        "lora_rank": Bounds(1, 1, 64),
        "feature_channels": Bounds(1, 64, 1280),
    }
    named = {axis for tensor in metadata.inputs for axis in tensor.axes if isinstance(axis, str)}
    known = {axis for axis in named if axis in usual}
    unknown = sorted(set(asked) - known)
    if unknown:
        raise RequestError(
            f"profile: axes must be among {', '.join(sorted(known))}, got {', '.join(unknown)}"
        )
    bounds = {axis: asked.get(axis, usual[axis]) for axis in known}
    for axis, ends in bounds.items():
        ends.check(axis)
        if axis in ("height", "width") and any(end % multiple for end in ends):
            raise RequestError(
                f"profile: {axis} must be of multiples of {multiple}, got {tuple(ends)}"
            )
    if metadata.positions is not None and bounds["frames"].most > metadata.positions:
        raise RequestError(
            f"profile: frames must be at most {metadata.positions}, of which the network knows the "
            f"positions, got {tuple(bounds['frames'])}"
        )
    for axis in named - known:
        found = _TOKENS.fullmatch(axis)
        if found is None:
            raise RequestError(f"profile: the network has an axis that is not known: {axis!r}")
        heights, widths = bounds["height"], bounds["width"]
        every = [level_tokens(h, w, int(found[2])) for h, w in zip(heights, widths, strict=True)]
        bounds[axis] = Bounds(1, 1, every[2]) if found[1] else Bounds(*every)
    return Profile(bounds)
