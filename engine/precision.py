"""Float32 that is float32 on a GPU too."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

cudnn: Any = torch.backends.cudnn  # what it has at run time is more than what it is said to have


class _Switch:
    """PyTorch's switch for convolutions, which is the process's: the last to leave puts it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], None] = lambda: None

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._restore = _forbid_tf32()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._restore()


_SWITCH = _Switch()


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block, convolutions of float32 are done in float32; also as a decorator.

    PyTorch lets cuDNN round what they are given to TF32, 10 bits after the point, by default,
    which errs by about a thousandth. Who wants speed asks for float16 or bfloat16. The switch is
    the process's: of several threads the first turns it, and the last puts it back.
    """
    if torch.compiler.is_compiling():  # whoever compiles has the block around what runs
        yield
        return
    _SWITCH.enter()
    try:
        yield
    finally:
        _SWITCH.leave()


def _forbid_tf32() -> Callable[[], None]:
    """Turn it off, and return what puts it back as it was.

    There are two ways to say it, and who reads the older one is refused where the newer says
    another thing; so the older is turned wherever it can be read, and the newer where that does
    not do, since the user has said it of all that a GPU computes.
    """
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        allowed = cudnn.allow_tf32
    except RuntimeError:  # the newer one says what the older has no words for
        allowed = None
    if allowed:
        cudnn.allow_tf32 = False
    if allowed is None or cudnn.conv.fp32_precision == "tf32":
        cudnn.conv.fp32_precision = "ieee"

    def restore() -> None:
        if allowed:
            cudnn.allow_tf32 = True
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before

    return restore
