"""Generate video whose motion is chosen by a reference clip and whose content by a prompt.

Load a model with `Engine.load`, read a reference with `Clip.read`, and pass it to
`Engine.generate` in a control: `MotionInjection` or `QueryInjection`.
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
