"""Train the embedded model: first its VAE on single frames, then text encoder and denoiser.

The denoiser learns v-prediction (Salimans & Ho, arXiv:2202.00512, sec. 4) on latents that are
rendered afresh at every step, so it never sees a clip twice. A step sees clips, or as many single
frames as the clips have in all: frames teach what words look like with a scene and a caption each,
where a clip spends all its frames on one. The learning rate warms up, stays, and falls linearly to
zero over the last `decay_steps`; what is shipped is an exponential moving average of the weights.

The state is saved every `save_every` steps under a temporary name and renamed, so a run that is
killed at any moment continues from its last save, and the last save is never half written.
"""

import contextlib
import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kinetiq.denoiser import EagerDenoiser
from kinetiq.errors import CheckpointError, OutputError, TrainingError
from kinetiq.files import follow_umask, write_tensors, write_text
from kinetiq.generation import Progress, no_progress
from kinetiq.sprites import components, world

_STATE = "state.safetensors"
_LOG = "log.jsonl"
_OPTIONS = "options.json"
_FORMER = "checkpoint.former"
_MAY_CHANGE = (
    "steps",
    "decay_steps",
    "learning_rate",
    "widening_steps",
    "save_every",
    "shards",
    "device",
)  # when a run is continued


@dataclass(frozen=True)
class TrainingOptions:
    """How to train the embedded model.

    Args:
        steps: optimiser steps of the denoiser in all.
        vae_steps: optimiser steps of the VAE.
        batch: clips a step; a step of single frames sees `FRAMES` times as many.
        frame_share: share of the steps that see single frames.
        noise_shift: how far training leans to noisy timesteps, s in t = s u / (1 + (s - 1) u) with
            u uniform (Esser et al., arXiv:2403.03206, sec. 5.3.2), in steps that see clips; 1 is
            uniform, as in steps that see single frames, which show each thing once.
        widening_steps: steps over which scenes widen from one a motion to all. While scenes differ
            in motion alone, its words explain a clip and are learnt in tens of steps; among all
            colours, shapes and paths from the start they were not in thousands.
        learning_rate: of AdamW, at its height.
        warmup_steps: steps over which the rate rises from zero.
        decay_steps: steps at the end over which the rate falls to zero.
        ema_decay: decay of the moving average, reached gradually.
        caption_dropout: share of captions replaced by "" for classifier-free guidance.
        seed: of weights, scenes, captions and noise.
        save_every: steps between saves.
        shards: parts of a batch whose gradients are computed side by side, one CPU thread each;
            1 leaves the threads to PyTorch.
        device: where the networks are trained, "cpu", "cuda" or "cuda:<index>".
    """

    steps: int = 20_000
    vae_steps: int = 2_500
    batch: int = 8
    frame_share: float = 0.25
    noise_shift: float = 3.0
    widening_steps: int = 5_000
    learning_rate: float = 6e-4
    warmup_steps: int = 300
    decay_steps: int = 3_000
    ema_decay: float = 0.999
    caption_dropout: float = 0.1
    seed: int = 0
    save_every: int = 250
    shards: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class TrainingStep:
    """One line of the log: mean losses since the last one, None where no step was of that kind."""

    stage: str
    step: int
    loss: float | None
    seconds: float
    frame_loss: float | None = None
    batch: int | None = None
    machine: str | None = None


Report = Callable[[TrainingStep], None]


def train(
    out: Path,
    options: TrainingOptions,
    *,
    start_from: Path | None = None,
    report: Report = lambda _: None,
    progress: Progress = no_progress,
) -> Path:
    """Train into `out` and return the folder of the finished diffusers checkpoint.

    A folder that holds an interrupted run of the same configuration continues it. `start_from`
    names a finished checkpoint to start from with a fresh optimiser. `report` is told of each save,
    `progress` of each step.

    Raises:
        OutputError: `out` cannot be written.
        CheckpointError: `out` or `start_from` holds another configuration.
        TrainingError: the loss is not finite.
    """
    if start_from is not None:
        _require_parts(start_from)
    said = {**asdict(options), "start_from": None if start_from is None else _digest(start_from)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        _recover_former(out)
        _require_same_run(out / _OPTIONS, said)
        write_text(out / _OPTIONS, json.dumps(said, indent=2) + "\n", "train")
    except OSError as error:
        raise OutputError(f"train: {out} must be a folder that can be written: {error}") from error
    torch.manual_seed(options.seed)
    tokenizer = components.build_tokenizer(out / "tokenizer")
    vae, scaling_factor = _train_vae(out / "vae", options, start_from, report, progress)
    torch.manual_seed(options.seed)  # whether or not the VAE drew from it just now
    text_encoder = components.build_text_encoder(len(tokenizer), tokenizer.eos_token_id)
    unet = components.build_unet()
    if start_from is not None:
        _load_finished(start_from / "text_encoder", text_encoder)
        _load_finished(start_from / "unet", unet)
        components.open_ordinary_kernels(unet)
    learner = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(options.device)
    average = _train_denoiser(
        out, learner, vae, scaling_factor, tokenizer, options, report, progress
    )
    return export_checkpoint(out, average, learner, vae, scaling_factor, tokenizer)


def export_checkpoint(
    out: Path,
    average: dict[str, Tensor],
    learner: nn.ModuleDict,
    vae: Any,
    scaling_factor: float,
    tokenizer: Any,
) -> Path:
    """Write `out`/checkpoint, an fp16 diffusers folder, replacing a former one only when whole."""
    from diffusers import AnimateDiffPipeline

    learner.load_state_dict(average)
    vae.register_to_config(scaling_factor=scaling_factor)
    pipeline = AnimateDiffPipeline(
        vae=vae,
        text_encoder=learner["text_encoder"],
        tokenizer=tokenizer,
        unet=learner["unet"],
        motion_adapter=None,
        scheduler=components.build_scheduler(),
    )
    fresh, final = out / "checkpoint.partial", out / "checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)
    _save_folder(pipeline.to("cpu", torch.float16), fresh)
    (fresh / "kinetiq.json").write_text(json.dumps(components.DEFAULTS, indent=2) + "\n")
    for config in fresh.rglob("config.json"):  # diffusers notes where a part was loaded from
        kept = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
    # transformers loads in the type that the configuration names, diffusers in float32: without
    # this, a stock pipeline that is loaded without a type is half the one and half the other.
    text_config = fresh / "text_encoder" / "config.json"
    said = json.loads(text_config.read_text()) | {"dtype": "float32"}
    text_config.write_text(json.dumps(said, indent=2) + "\n")
    former = out / _FORMER
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        final.rename(former)
    fresh.rename(final)
    shutil.rmtree(former, ignore_errors=True)
    return final


def velocity_pair(
    clean: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> tuple[Tensor, Tensor]:
    """The noised latents and the velocity to predict: a x + s e, and a e - s x."""
    signal = alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1, 1)
    spread = (1 - alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1, 1)
    return signal * clean + spread * noise, signal * noise - spread * clean


def shift_noise(share: Tensor, shift: float) -> Tensor:
    """Shares of the schedule in [0, 1), moved towards its noisy end: s u / (1 + (s - 1) u)."""
    return shift * share / (1 + (shift - 1) * share)


def learning_rate_share(step: int, options: TrainingOptions) -> float:
    """The share of the full learning rate at `step` (counted from 0)."""
    rising = (step + 1) / max(options.warmup_steps, 1)
    falling = (options.steps - step) / max(options.decay_steps, 1)
    return max(0.0, min(1.0, rising, falling))


def scene_variety(step: int, options: TrainingOptions) -> float:
    """The `variety` of the scenes of `step` (counted from 0), rising from 0 to 1."""
    return min(1.0, step / options.widening_steps) if options.widening_steps else 1.0


def _require_same_run(path: Path, said: dict[str, Any]) -> None:
    """Refuse to continue a run under options that would make it another one."""
    if not path.exists():
        return
    before = json.loads(path.read_text())
    changed = [
        f"{name} {before.get(name)!r} instead of {value!r}"
        for name, value in said.items()
        if name not in _MAY_CHANGE and before.get(name) != value
    ]
    if changed:
        raise CheckpointError(
            f"train: {path.parent} holds a run with {', '.join(changed)}; continue it with its own "
            "options, or train into another folder"
        )


def _train_vae(
    folder: Path,
    options: TrainingOptions,
    start_from: Path | None,
    report: Report,
    progress: Progress,
) -> tuple[Any, float]:
    """The VAE and its scaling factor, trained once and kept in `folder`."""
    from diffusers import AutoencoderKL

    device = torch.device(options.device)
    vae = components.build_vae().to(device)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if not folder.exists() and start_from is not None:
        shutil.copytree(start_from / "vae", partial)
        partial.rename(folder)
    if folder.exists():
        vae = AutoencoderKL.from_pretrained(folder).float().to(device)
        return vae.requires_grad_(False).eval(), float(vae.config.scaling_factor)
    rng = np.random.default_rng(options.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    began = time.monotonic()
    for step in range(options.vae_steps):
        falling = 0.5 * (1 + math.cos(math.pi * step / options.vae_steps))
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 100, 1.0) * falling
        frames = _single_frames(rng, 32).to(device)
        posterior = vae.encode(frames).latent_dist
        latents = posterior.sample()
        shown = vae.decode(latents).sample
        error = shown - frames
        loss = error.square().mean() + 0.2 * error.abs().mean() + 1e-5 * posterior.kl().mean()
        _require_finite(loss, "loss of the VAE", step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress("vae", step + 1, options.vae_steps)
        if step % 50 == 49:
            report(TrainingStep("vae", step + 1, loss.item(), time.monotonic() - began))
    vae.requires_grad_(False).eval()
    with torch.no_grad():
        latents = vae.encode(_single_frames(rng, 512).to(device)).latent_dist.mode()
    scaling_factor = round(1.0 / latents.std().item(), 4)
    vae.register_to_config(scaling_factor=scaling_factor)
    _save_folder(vae, partial)
    partial.rename(folder)
    return vae, scaling_factor


def _train_denoiser(
    out: Path,
    learner: nn.ModuleDict,
    vae: Any,
    scaling_factor: float,
    tokenizer: Any,
    options: TrainingOptions,
    report: Report,
    progress: Progress,
) -> dict[str, Tensor]:
    """Train `learner` in place; return the moving average of its weights."""
    parameters = list(learner.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=options.learning_rate, weight_decay=0.01, fused=True
    )
    average = {name: value.detach().clone() for name, value in learner.state_dict().items()}
    first, spent = _load_state(out, learner, optimizer, average)
    denoiser = EagerDenoiser(learner["unet"], keep_zero_taps=True).attach()
    compute = Gradients(denoiser, learner["text_encoder"], parameters, options)
    where = f"{platform.processor() or platform.machine()}, {options.device}"
    began = time.monotonic()
    losses: dict[bool, list[float]] = {False: [], True: []}  # by: is the step of single frames?
    for step in range(first, options.steps):
        rng = np.random.default_rng([options.seed, step])
        of_frames = bool(rng.uniform() < options.frame_share)
        if of_frames:
            clean, captions = sample_frames(rng, vae, scaling_factor, options)
        else:
            variety = scene_variety(step, options)
            clean, captions = sample_clips(rng, vae, scaling_factor, options, variety)
        tokens = tokenizer(
            captions,
            padding="max_length",
            max_length=components.MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(clean.device)
        loss, gradients = compute(clean, tokens, step)
        _require_finite(loss, "loss", step)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        _require_finite(nn.utils.clip_grad_norm_(parameters, 1.0), "gradient", step)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * learning_rate_share(step, options)
        optimizer.step()
        decay = min(options.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in learner.state_dict().items():
                if value.is_floating_point():
                    average[name].lerp_(value, 1 - decay)
        losses[of_frames].append(loss.item())
        progress("denoiser", step + 1, options.steps)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            seconds = spent + time.monotonic() - began
            clips, frames = (float(np.mean(kind)) if kind else None for kind in losses.values())
            line = TrainingStep("denoiser", step + 1, clips, seconds, frames, options.batch, where)
            losses = {False: [], True: []}
            _save_state(out, learner, optimizer, average, line)
            report(line)
    denoiser.detach()
    return average


class Gradients:
    """The loss of a batch and its gradients, part by part and side by side."""

    def __init__(
        self,
        denoiser: EagerDenoiser,
        text_encoder: nn.Module,
        parameters: list[nn.Parameter],
        options: TrainingOptions,
    ) -> None:
        self._denoiser = denoiser
        self._text_encoder = text_encoder
        self._parameters = parameters
        self._options = options
        self._alphas_cumprod = components.build_scheduler().alphas_cumprod.to(options.device)

    def __call__(self, clean: Tensor, tokens: Tensor, step: int) -> tuple[Tensor, list[Any]]:
        """Noise the clean latents [n, channels, frames, h, w] and learn from all of them."""
        words = np.random.SeedSequence([self._options.seed, step, 1]).generate_state(2)
        generator = torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        count = len(clean)
        stratum = torch.arange(count) + torch.rand(count, generator=generator)
        shift = self._options.noise_shift if clean.shape[2] > 1 else 1.0
        share = shift_noise(stratum / count, shift)
        last = len(self._alphas_cumprod) - 1
        timesteps = (share * (last + 1)).long().clamp(max=last)  # a share may round to 1
        timesteps = timesteps[torch.randperm(count, generator=generator)].to(clean.device)
        noised, velocity = velocity_pair(clean, noise, timesteps, self._alphas_cumprod)
        batch = (noised, velocity, timesteps, tokens)
        shards = min(self._options.shards, count)
        if shards == 1:
            return self._learn(*batch)
        parts = zip(*(tensor.tensor_split(shards) for tensor in batch), strict=True)
        with ThreadPoolExecutor(shards, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            learnt = list(pool.map(lambda part: self._learn(*part), parts))
        shares = [len(part) / count for part in clean.tensor_split(shards)]
        columns = zip(*([loss, *gradients] for loss, gradients in learnt), strict=True)
        loss, *gradients = [_weighted_sum(shares, column) for column in columns]
        return loss, gradients

    def _learn(
        self, noised: Tensor, velocity: Tensor, timesteps: Tensor, tokens: Tensor
    ) -> tuple[Tensor, list[Any]]:
        # A cache of casts would be shared by the threads, and each weight is cast once anyway.
        with torch.autocast(noised.device.type, torch.bfloat16, cache_enabled=False):
            guess = self._denoiser.predict(noised, timesteps, self._text_encoder(tokens)[0])
        loss = (guess.float() - velocity).square().mean()
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return loss.detach(), list(gradients)


def _weighted_sum(shares: list[float], parts: tuple[Any, ...]) -> Any:
    """What the parts computed as one; None where a parameter is not used."""
    if parts[0] is None:
        return None
    return sum(share * part for share, part in zip(shares, parts, strict=True))


def _single_frames(rng: np.random.Generator, count: int) -> Tensor:
    """Frames of random scenes in [-1, 1], [count, 3, size, size]."""
    scenes = [world.sample_scene(rng) for _ in range(count)]
    clips = world.render(scenes, frames=1, size=components.SIZE)
    return clips[:, 0].permute(0, 3, 1, 2) * 2 - 1


@torch.no_grad()
def sample_clips(
    rng: np.random.Generator,
    vae: Any,
    scaling_factor: float,
    options: TrainingOptions,
    variety: float = 1.0,
) -> tuple[Tensor, list[str]]:
    """Scaled latents [batch, channels, frames, h, w] and captions, some of them empty."""
    scenes = [world.sample_scene(rng, variety=variety) for _ in range(options.batch)]
    captions = [
        ""
        if rng.uniform() < options.caption_dropout
        else world.sample_caption(rng, scene, variety).text
        for scene in scenes
    ]
    latents = _encode(world.render(scenes, components.FRAMES, components.SIZE), vae, scaling_factor)
    return latents, captions


@torch.no_grad()
def sample_frames(
    rng: np.random.Generator, vae: Any, scaling_factor: float, options: TrainingOptions
) -> tuple[Tensor, list[str]]:
    """Scaled latents [batch * FRAMES, channels, 1, h, w] of as many scenes; no word on motion."""
    scenes = [world.sample_scene(rng) for _ in range(options.batch * components.FRAMES)]
    captions = [
        ""
        if rng.uniform() < options.caption_dropout
        else world.sample_caption(rng, scene).without_motion().text
        for scene in scenes
    ]
    moments = rng.uniform(size=len(scenes)).tolist()
    clips = world.render(scenes, 1, components.SIZE, moments)
    return _encode(clips, vae, scaling_factor), captions


def _encode(clips: Tensor, vae: Any, scaling_factor: float) -> Tensor:
    """Latents [n, channels, frames, h, w] of clips in [0, 1], [n, frames, size, size, 3]."""
    frames = (clips.flatten(0, 1).permute(0, 3, 1, 2) * 2 - 1).to(vae.device)
    latents: Tensor = vae.encode(frames).latent_dist.mode().unflatten(0, clips.shape[:2])
    return latents.transpose(1, 2) * scaling_factor


def _require_finite(value: Tensor, name: str, step: int) -> None:
    """Raise before what is not finite reaches the weights, so that every save is whole."""
    if not value.isfinite():
        raise TrainingError(
            f"train: the {name} must be finite, got {value.item()} at step {step}; "
            "continue from the last save with a lower learning rate"
        )


def _require_parts(start_from: Path) -> None:
    missing = [n for n in ("vae", "text_encoder", "unet") if not (start_from / n).is_dir()]
    if missing:
        raise CheckpointError(
            f"train: {start_from} must be a finished checkpoint, and lacks {', '.join(missing)}"
        )


def _recover_former(out: Path) -> None:
    """Bring back the finished checkpoint of a run that was killed while it replaced it."""
    former, final = out / _FORMER, out / "checkpoint"
    if former.exists() and not final.exists():
        former.rename(final)


def _digest(folder: Path) -> str:
    """What tells one checkpoint from another, wherever it lies."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _save_folder(part: Any, folder: Path) -> None:
    """Save a diffusers model or pipeline."""
    part.save_pretrained(folder, safe_serialization=True)
    for weights in folder.rglob("*.safetensors"):
        follow_umask(weights)


def _save_state(
    out: Path,
    learner: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    line: TrainingStep,
) -> None:
    tensors = {f"weights.{name}": value for name, value in learner.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    for name, value in tensors.items():
        _require_finite(value.abs().max(), name, line.step)
    partial = out / (_STATE + ".partial")
    write_tensors(partial, tensors, {"step": str(line.step), "seconds": str(line.seconds)})
    partial.replace(out / _STATE)
    with (out / _LOG).open("a") as log:
        log.write(json.dumps(asdict(line)) + "\n")


def _load_state(
    out: Path,
    learner: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> tuple[int, float]:
    """Restore a saved run in place; return the steps done and the seconds they took."""
    from safetensors import safe_open

    if not (out / _STATE).exists():
        return 0, 0.0
    with safe_open(out / _STATE, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wanted = learner.state_dict()
    weights = _part(tensors, "weights.")
    if {n: v.shape for n, v in weights.items()} != {n: v.shape for n, v in wanted.items()}:
        raise CheckpointError(
            f"train: {out / _STATE} must hold a run of this configuration, got other shapes; "
            "train into another folder"
        )
    learner.load_state_dict(weights)
    for name, value in _part(tensors, "average.").items():
        average[name] = value.to(average[name].device)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _part(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(metadata["step"]), float(metadata["seconds"])


def _load_finished(folder: Path, module: nn.Module) -> None:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(f"train: {folder} must hold one safetensors file, got {len(files)}")
    weights = {name: value.float() for name, value in load_file(files[0]).items()}
    wanted = module.state_dict()
    if {n: v.shape for n, v in weights.items()} != {n: v.shape for n, v in wanted.items()}:
        raise CheckpointError(f"train: {files[0]} must have the shapes of this configuration")
    module.load_state_dict(weights)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use `count` CPU threads inside the block; None leaves the number as it is."""
    former = torch.get_num_threads()
    torch.set_num_threads(former if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(former)
