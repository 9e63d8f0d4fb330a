"""Generate video whose motion is chosen by a reference clip and whose content by a prompt.

Load a model with `Engine.load`, read a reference with `Clip.read`, and pass it to
`Engine.generate` in a control: `MotionInjection` or `QueryInjection`. Or pass a motion that was
learned before, `MotionEmbedding.read` or `MotionLora.read`. Or move what is generated with
gradients, towards a clip, a direction or a drag: `MoftGuidance`. Several clips of one subject are
`ConsistentShots`, for `Engine.generate_shots`. A product whose requests come at any time submits
them to a `LiveBatch`.

Names are imported when they are first used, so that `import kinetiq` is quick.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from kinetiq.errors import (
    BusyError,
    CheckpointError,
    ClipError,
    InputError,
    KinetiqError,
    KinetiqWarning,
    MissingDependencyError,
    NonFiniteError,
    OutputError,
    RequestError,
    ShapeError,
    TrainingError,
    WorkError,
)

if TYPE_CHECKING:
    from kinetiq.clip import Clip
    from kinetiq.engine import Engine
    from kinetiq.live_batch import LiveBatch
    from kinetiq.moft_guidance import MoftGuidance, MoftRegion
    from kinetiq.motion_embedding import MotionEmbedding
    from kinetiq.motion_injection import MotionInjection
    from kinetiq.motion_lora import MotionLora
    from kinetiq.query_injection import QueryInjection
    from kinetiq.request import Request
    from kinetiq.shots import ConsistentShots, Shot, ShotBoard

__version__ = version("kinetiq")

_HOMES = {
    "Clip": "kinetiq.clip",
    "ConsistentShots": "kinetiq.shots",
    "Engine": "kinetiq.engine",
    "LiveBatch": "kinetiq.live_batch",
    "MoftGuidance": "kinetiq.moft_guidance",
    "MoftRegion": "kinetiq.moft_guidance",
    "MotionEmbedding": "kinetiq.motion_embedding",
    "MotionInjection": "kinetiq.motion_injection",
    "MotionLora": "kinetiq.motion_lora",
    "QueryInjection": "kinetiq.query_injection",
    "Request": "kinetiq.request",
    "Shot": "kinetiq.shots",
    "ShotBoard": "kinetiq.shots",
}

__all__ = [
    "BusyError",
    "CheckpointError",
    "Clip",
    "ClipError",
    "ConsistentShots",
    "Engine",
    "InputError",
    "KinetiqError",
    "KinetiqWarning",
    "LiveBatch",
    "MissingDependencyError",
    "MoftGuidance",
    "MoftRegion",
    "MotionEmbedding",
    "MotionInjection",
    "MotionLora",
    "NonFiniteError",
    "OutputError",
    "QueryInjection",
    "Request",
    "RequestError",
    "ShapeError",
    "Shot",
    "ShotBoard",
    "TrainingError",
    "WorkError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kinetiq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, whether they have been used or not."""
    return __all__
