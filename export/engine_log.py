"""What TensorRT says while it builds and runs, kept so that errors can be in its words."""

import logging
from typing import Any

_LOG = logging.getLogger(__name__)
_LAYERS = "Layers:"  # what the list of layers that a build ends with begins with
_KEPT = 16  # errors; a run that fails at every step must not fill the memory
_NO_ROOM = ("out of memory", "outofmemory", "could not be allocated", "failed to allocate")
_NO_ROOM_OF_ORT = ("std::bad_alloc", "smaller than requested bytes")


def make_log(package: Any) -> Any:
    """A logger whose `errors` are the last that were said, and `layers` the final list of layers.

    Args:
        package: `tensorrt` or `tensorrt_rtx`.
    """
    serious = (package.ILogger.INTERNAL_ERROR, package.ILogger.ERROR)

    class Log(package.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            package.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in serious:
                self.errors = [*self.errors[1 - _KEPT :], message]
            if message.startswith(_LAYERS):
                self.layers += message
            _LOG.debug("%s: %s", severity, message)

    return Log()


def says_no_room(words: str) -> bool:
    """Whether TensorRT, onnxruntime or CUDA says that memory could not be allocated."""
    return any(part in words.lower() for part in (*_NO_ROOM, *_NO_ROOM_OF_ORT))
