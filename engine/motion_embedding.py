"""Motion embeddings."""

from collections.abc import Mapping

import attrs

from kinetiq.control_tensors import MotionBank


@attrs.frozen(eq=False)
class ResolvedMotionEmbedding:
    """A motion embedding as data for one clip.

    Args:
        key: what two embeddings with the same banks have in common.
        banks: by index of the temporal site, one slot each, resampled to the clip, debiased and
            projected.
        scale: factor on the embedding.
        steps: how many steps it acts in, from the first.
        conditional_only: whether the unconditional row is left alone.
    """

    key: str
    banks: Mapping[int, MotionBank]
    scale: float
    steps: int
    conditional_only: bool
