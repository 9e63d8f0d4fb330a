"""What an operator costs at the least, whatever the implementation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The least work of one call; measured times are held against it.

    Args:
        bytes: what must cross memory: each input once, each output once.
        flops: additions and multiplications of the formula, without padding or recomputation.
    """

    bytes: int
    flops: int

    def least_seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The roof: what the slower of memory and arithmetic takes, were the other free."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)
