"""Motions that are learned for a bench, each once: kept by what they were learned from and how."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.motion_embedding import MotionEmbedding
from kinetiq.motion_lora import MotionLora
from kinetiq.motion_training import (
    EmbeddingOptions,
    LoraOptions,
    train_embedding,
    train_lora,
)
from kinetiq.sprites import metrics, world
from kinetiq.sprites.cases import TransferPair
from kinetiq.sprites.metrics import Fidelity
from kinetiq.sprites.reading import ClipReading
from kinetiq.sprites.world import Caption, Mention, Scene

Motion = MotionEmbedding | MotionLora


def motion_folder() -> Path:
    """Where learned motions are kept between runs: the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "kinetiq" / "motions"


def describe(scene: Scene) -> str:
    """The caption that says all there is to say of a scene's first shape."""
    sprite = scene.sprites[0]
    mention = Mention(
        sprite.shape, world.colour_name(sprite.hue), sprite.texture, sprite.path.motion
    )
    return Caption((mention,), world.colour_name(scene.background_hue)).text


def learn(
    engine: Engine, pair: TransferPair, options: EmbeddingOptions | LoraOptions, folder: Path
) -> Motion:
    """The motion of a pair's reference: read from `folder`, or learned and kept there."""
    reference, prompt = pair.reference(), describe(pair.scene)
    kind = "embedding" if isinstance(options, EmbeddingOptions) else "lora"
    said = f"{_weights(engine)} {kind} {sorted(asdict(options).items())} {prompt}"
    key = hashlib.sha256(f"{said} {reference.fingerprint}".encode()).hexdigest()[:24]
    path = folder / f"{kind}-{key}.safetensors"
    if isinstance(options, EmbeddingOptions):
        if path.exists():
            return MotionEmbedding.read(path)
        return train_embedding(engine, reference, prompt, path, options)
    if path.exists():
        return MotionLora.read(path)
    return train_lora(engine, [reference], [prompt], path, options)


def controls_by_reference(
    motions: Sequence[tuple[TransferPair, Motion]], change: Callable[[Motion], Any]
) -> Callable[[Clip], Any]:
    """What `transfer` asks for: the control of a reference, after `change`."""
    known = {pair.reference().fingerprint: motion for pair, motion in motions}
    return lambda clip: change(known[clip.fingerprint])


def fidelity_to(
    readings: Sequence[ClipReading], pairs: Sequence[TransferPair], factor: float
) -> Fidelity:
    """Motion fidelity to the references' paths times `factor`: -1 is the opposite motion."""
    return metrics.motion_fidelity(
        paths_of(readings, pairs),
        [factor * pair.sprite.path.points(readings[0].frames) for pair in pairs],
    )


def paths_of(
    readings: Sequence[ClipReading], pairs: Sequence[TransferPair]
) -> list[np.ndarray | None]:
    """The path of the shape that each prompt means, None where it shows none."""
    meant = [
        metrics.match_sprites(reading, pair.caption)[0]
        for reading, pair in zip(readings, pairs, strict=True)
    ]
    return [None if sprite is None else sprite.path for sprite in meant]


def displacement(paths: Sequence[np.ndarray | None]) -> list[float]:
    """How far each shape goes from frame to frame, in all; nothing where there is none."""
    return [
        0.0 if path is None else float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())
        for path in paths
    ]


def _weights(engine: Engine) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(engine.checkpoint.unet.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]
