"""Triton where it is installed; elsewhere a stand-in, so that the operators' CPU paths still work.

Triton has no package for macOS or Windows. There a kernel is defined by name only, and to launch
one is an error in words.
"""

from typing import Any

from kinetiq.errors import MissingDependencyError

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Missing:
        """Answers for any name of Triton, until a kernel is launched."""

        @staticmethod
        def next_power_of_2(n: int) -> int:
            """As Triton's, since sizes are worked out before anything is launched."""
            return 1 << (n - 1).bit_length()

        def __getattr__(self, name: str) -> "_Missing":
            return self

        def __call__(self, *_: Any, **__: Any) -> "_Missing":
            return self

        def __getitem__(self, grid: Any) -> "_Missing":
            raise MissingDependencyError(
                "kernels: Triton must be installed to run on a GPU, and is not; "
                "pip install triton (Linux)"
            )

    triton = tl = _Missing()

__all__ = ["tl", "triton"]
