"""Motions that are learned for a bench, each once: kept by what they were learned from and how."""

import hashlib
import inspect
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from kinetiq import inversion, motion_embedding, motion_losses, motion_training, spatial_lora
from kinetiq.bench.figures import Figure
from kinetiq.bench.sprites import figure
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.files import make_cache
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
) -> tuple[Motion, float | None]:
    """The motion of a pair's reference: read from `folder`, or learned and kept there.

    Also the seconds it took; None where it was read, or where a run that was killed went on.
    """
    reference, prompt = pair.reference(), describe(pair.scene)
    kind = "embedding" if isinstance(options, EmbeddingOptions) else "lora"
    said = f"{_model(engine)} {_TRAINING} {kind} {sorted(asdict(options).items())} {prompt}"
    key = hashlib.sha256(f"{said} {reference.fingerprint}".encode()).hexdigest()[:24]
    make_cache(folder, "bench", " to keep learned motions in")
    path = folder / f"{kind}-{key}.safetensors"
    motion: Motion
    if path.exists():
        motion = (MotionEmbedding if kind == "embedding" else MotionLora).read(path)
        return motion, None
    goes_on = path.with_suffix(".training").exists()
    began = time.perf_counter()
    if isinstance(options, EmbeddingOptions):
        motion = train_embedding(engine, reference, prompt, path, options)
    else:
        motion = train_lora(engine, [reference], [prompt], path, options)
    return motion, None if goes_on else time.perf_counter() - began


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


def displacement(path: np.ndarray) -> float:
    """How far a shape goes from frame to frame, in all."""
    return float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())


def mean_by_reference(values: Sequence[float], prompts: int, bounds: tuple[float, float]) -> Figure:
    """A mean whose interval counts references: clips of one learned motion are not independent."""
    groups = np.asarray(values, dtype=float).reshape(-1, prompts).mean(axis=1)
    return figure(metrics.mean_with_interval(groups, bounds=bounds))


def _model(engine: Engine) -> str:
    """What tells a checkpoint from another: all of its weights."""
    digest = hashlib.sha256()
    parts = (engine.checkpoint.unet, engine.checkpoint.vae, engine.checkpoint.text_encoder)
    for part in parts:
        for name, value in sorted(part.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _code(*modules: ModuleType) -> str:
    """What tells a way of training from another: the text of the modules that do it."""
    texts = "".join(inspect.getsource(module) for module in modules)
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


_TRAINING = _code(motion_training, motion_losses, inversion, spatial_lora, motion_embedding)
