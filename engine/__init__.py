"""Generate video whose motion is chosen by a reference clip and whose content by a prompt.

    import kinetiq as kq

    engine = kq.Engine.load("sprites")
    reference = kq.Clip.read("zigzag.mp4")
    clip = engine.generate("a red circle on a dark blue background", kq.MotionInjection(reference))
    clip.write("out.mp4")
"""

from importlib.metadata import version

from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.errors import (
    CheckpointError,
    ClipError,
    InputError,
    KinetiqError,
    MissingDependencyError,
    NonFiniteError,
    OutputError,
    RequestError,
    ShapeError,
    TrainingError,
    WorkError,
)
from kinetiq.motion_injection import MotionInjection
from kinetiq.query_injection import QueryInjection
from kinetiq.request import Request

__version__ = version("kinetiq")

__all__ = [
    "CheckpointError",
    "Clip",
    "ClipError",
    "Engine",
    "InputError",
    "KinetiqError",
    "MissingDependencyError",
    "MotionInjection",
    "NonFiniteError",
    "OutputError",
    "QueryInjection",
    "Request",
    "RequestError",
    "ShapeError",
    "TrainingError",
    "WorkError",
    "__version__",
]
