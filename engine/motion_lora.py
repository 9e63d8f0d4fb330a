"""Motion LoRA."""

from collections.abc import Mapping

import attrs

from kinetiq.control_tensors import LoraBank


@attrs.frozen(eq=False)
class ResolvedHighway:
    """Where the skip connections of one clip's rows start; see `SkipControl`.

    Args:
        source: for each skip connection, 0 behind the temporal transformer to 1 before it.
        gain: for each skip connection, a factor.
    """

    source: tuple[float, ...]
    gain: tuple[float, ...]


@attrs.frozen(eq=False)
class ResolvedMotionLora:
    """A motion LoRA as data for one clip.

    Args:
        key: what two LoRAs with the same banks have in common.
        banks: by module path of the projection, one slot each.
        scale: factor on the low-rank change.
        steps: how many steps it and its highway act in, from the first.
        conditional_only: whether the unconditional row is left alone.
        highway: or None.
    """

    key: str
    banks: Mapping[str, LoraBank]
    scale: float
    steps: int
    conditional_only: bool
    highway: ResolvedHighway | None
