"""Models whose clips are timed: full-size configurations with random weights, and the embedded one.

What weights are makes no difference to speed and memory, so published architectures are measured
without their checkpoints: AnimateDiff on SD 1.5, and ZeroScope, with the VAE of either. Text is
random too, one tensor a prompt, and no text encoder is run.
"""

import contextlib
import functools
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kinetiq.backends import COMPILED
from kinetiq.bench.moft_cost import random_channels
from kinetiq.board_run import BoardLatents
from kinetiq.checkpoint import Checkpoint
from kinetiq.clip import Clip
from kinetiq.compiled import CompiledDenoiser
from kinetiq.denoiser import NO_CONTROLS, Denoiser, EagerDenoiser
from kinetiq.engine import Engine
from kinetiq.errors import KinetiqError, WorkError
from kinetiq.families import FAMILIES, SiteKind
from kinetiq.generation import denoise, in_order
from kinetiq.moft import MotionChannels, load_channels
from kinetiq.motion_embedding import MotionEmbedding, site_size
from kinetiq.motion_file import MotionInfo
from kinetiq.motion_lora import MotionLora, lora_paths
from kinetiq.request import Request, ResolvedRequest
from kinetiq.shots import ConsistentShots
from kinetiq.text import encode_prompts

_VAE: Mapping[str, Any] = MappingProxyType(
    {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    }
)
_SCHEDULER: Mapping[str, Any] = MappingProxyType(
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
)
_SLACK = 2.0  # times the error of the stock network in its own type
_TIMESTEP = 500.0  # of the type that the sampler's have
LEARNED_SIZE = (16, 16)  # latents that random embeddings were learned at; they are resized for use
_RANK = 16  # of a random LoRA
_STRENGTH = 0.1  # of random motions, beside activations of order one


@dataclass(frozen=True)
class FullSize:
    """A published architecture and the clip that it is measured at.

    Args:
        name: as in figures.
        family: a name of `FAMILIES`.
        config: of the network.
        vae: configuration of the VAE.
        text: tokens and width.
        frames: of the clip.
        height: pixels.
        width: pixels.
        guidance_scale: of every request.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    text: tuple[int, int]
    frames: int
    height: int
    width: int
    vae: Mapping[str, Any] = field(default_factory=lambda: _VAE)
    guidance_scale: float = 7.5

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the latents."""
        scale = 2 ** (len(self.vae["block_out_channels"]) - 1)
        channels = int(self.vae["latent_channels"])
        return channels, self.frames, self.height // scale, self.width // scale


ANIMATEDIFF = FullSize(
    "animatediff", "animatediff", {"cross_attention_dim": 768}, (77, 768), 16, 512, 512
)
ZEROSCOPE = FullSize("zeroscope", "unet3d", {}, (77, 1024), 24, 320, 576)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model at work: an engine, and how it gets text and motions.

    Args:
        name: as in figures.
        engine: with our modules in its network.
        encode_text: a prompt to [tokens, width].
        channels: motion channels of a tap.
        frames: of its clips.
        height: pixels.
        width: pixels.
        guidance_scale: of every request.
        reference: a clip for controls that want one.
        flops: of one prediction for a clip with guidance, 0 where not counted.
        check: raises a `WorkError` unless a denoiser of its network predicts for so many clips with
            guidance, without any control, what it must.
    """

    name: str
    engine: Engine
    encode_text: Callable[[str], Tensor]
    channels: Callable[[str], MotionChannels]
    frames: int
    height: int
    width: int
    guidance_scale: float
    reference: Clip
    flops: int = 0
    check: Callable[[Denoiser, int], None] = field(default=lambda *_: _refuse_unchecked())

    @property
    def device(self) -> torch.device:
        """Where its network is."""
        return self.engine.checkpoint.device

    @property
    def dtype(self) -> torch.dtype:
        """What its network computes in."""
        return self.engine.checkpoint.dtype

    def requests(self, count: int, controls: Any = None, *, steps: int) -> list[Request]:
        """Clips of one prompt and several seeds under a control, or each under its own of a list.

        Args:
            count: how many.
            controls: one for all, a list of one each, or None.
            steps: of the sampler.
        """
        each = controls if isinstance(controls, list) else [controls] * count
        return [
            Request(
                "a red circle",
                control,
                seed=seed,
                steps=steps,
                guidance_scale=self.guidance_scale,
                frames=self.frames,
                height=self.height,
                width=self.width,
                sampler="ddim",
            )
            for seed, control in enumerate(each)
        ]

    def resolve(self, requests: Sequence[Request]) -> list[ResolvedRequest]:
        """Everything that is done before the first step, each motion brought to the network once.

        A batch of clips with a reference in common shares what was encoded of it.
        """
        encode = self.engine._reference_encoder()  # noqa: SLF001  it remembers
        makers = attrs.evolve(
            self.engine._makers(encode),  # noqa: SLF001  likewise
            channels=functools.cache(self.channels),
        )
        return [self.engine.resolve(request, encode, makers) for request in requests]

    def sample(self, requests: Sequence[ResolvedRequest]) -> list[Tensor]:
        """Latents of clips that are sampled together.

        Raises:
            WorkError: they did not fit into memory together.
            KinetiqError: what else goes wrong.
        """
        before = self._exhausted()
        results = denoise(
            enumerate(requests),
            self.engine.denoiser,
            self.encode_text,
            channels=self.engine.checkpoint.unet.config.in_channels,
            device=self.device,
            dtype=self.dtype,
            max_clips=len(requests),
        )
        found = list(in_order(results))
        for latents in found:
            if isinstance(latents, KinetiqError):
                raise latents
        if self._exhausted() > before:  # smaller parts fitted, which is not what is measured
            raise WorkError(f"{len(requests)} clips must fit into memory together, and do not")
        return found

    def sample_shots(self, shots: ConsistentShots) -> list[Tensor]:
        """Latents of the shots of one board.

        Raises:
            KinetiqError: what goes wrong.
        """
        results = denoise(
            [(0, self.engine.resolve_shots(shots))],
            self.engine.denoiser,
            self.encode_text,
            channels=self.engine.checkpoint.unet.config.in_channels,
            device=self.device,
            dtype=self.dtype,
            max_clips=len(shots.shots),
        )
        (found,) = in_order(results)
        if isinstance(found, KinetiqError):
            raise found
        assert isinstance(found, BoardLatents)
        return list(found.latents)

    def clips(self, requests: Sequence[ResolvedRequest]) -> list[Clip]:
        """Whole clips: `sample`, then the VAE."""
        return [self.engine.decode(latents, 8.0) for latents in self.sample(requests)]

    def _exhausted(self) -> int:
        """How often the GPU's memory was not enough so far."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.memory_stats(self.device).get("num_ooms", 0))


def embedded_subject(device: str, reference: Clip, dtype: torch.dtype = torch.float32) -> Subject:
    """The embedded model with its weights, its text encoder and its motion channels."""
    engine = Engine.load("sprites", device=device, dtype=dtype)
    defaults, checkpoint = engine.defaults, engine.checkpoint
    return Subject(
        name="embedded",
        engine=engine,
        encode_text=functools.cache(lambda prompt: encode_prompts(checkpoint, [prompt])[0]),
        channels=lambda tap: load_channels(checkpoint, engine.denoiser, tap),
        frames=defaults.frames,
        height=defaults.height,
        width=defaults.width,
        guidance_scale=defaults.guidance_scale,
        reference=reference,
    )


def full_size_subject(model: FullSize, device: str, dtype: torch.dtype) -> Subject:
    """A full-size network and VAE with random weights, once our modules are seen to be right.

    Raises:
        WorkError: with them the network errs more than twice as much as the stock one does.
    """
    import diffusers

    torch.manual_seed(0)
    with torch.device(device):
        network = getattr(diffusers, FAMILIES[model.family].network)(**model.config)
        vae = diffusers.AutoencoderKL(**model.vae)
    for part in (network, vae):
        part.eval().requires_grad_(False)
    wake(network)
    given = _prediction_inputs(model, device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = predict_stock(network, model.family, *given)
    for part in (network, vae):
        nn.Module.to(part, dtype)  # diffusers' own warns of layers that it has none of
    with FlopCounterMode(display=False) as counter:
        usual = predict_stock(network, model.family, *given)
    denoiser = EagerDenoiser(network).attach()
    check = functools.partial(check_prediction, model.name, given, usual, exact)
    check(denoiser, 1)
    encode_text = random_text(model.text, device)
    checkpoint = Checkpoint(
        name=model.name,
        path=None,
        family=model.family,
        unet=network,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        scheduler="DDIMScheduler",
        scheduler_config=_SCHEDULER,
        identify=lambda: "random",
    )
    pixels = torch.rand(model.frames, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    return Subject(
        name=model.name,
        engine=Engine(checkpoint, denoiser),
        encode_text=encode_text,
        channels=lambda _: random_channels(network),
        frames=model.frames,
        height=model.height,
        width=model.width,
        guidance_scale=model.guidance_scale,
        reference=Clip.from_array(pixels),
        flops=counter.get_total_flops(),
        check=check,
    )


def wake(network: nn.Module) -> None:
    """Draw the weights that start as zero: layers behind them would have no say in any result."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            fan_in = parameter[0].numel()
            parameter.data.normal_(std=fan_in**-0.5)


def random_text(shape: tuple[int, int], device: str) -> Callable[[str], Tensor]:
    """What stands for a text encoder: a tensor of order one for each prompt."""

    @functools.cache
    def encode(prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        return torch.randn(shape, generator=generator).to(device)

    return encode


def predict_stock(
    network: nn.Module, family: str, latents: Tensor, timesteps: Tensor, text: Tensor
) -> Tensor:
    """The output of a network without our modules, in its type."""
    dtype = next(network.parameters()).dtype
    if family == "animatediff":  # its text is one a frame
        text = text.repeat_interleave(latents.shape[2], dim=0)
    with torch.inference_mode():
        output: Tensor = network(latents.to(dtype), timesteps, text.to(dtype), return_dict=False)[0]
    return output


def check_prediction(
    name: str,
    given: tuple[Tensor, Tensor, Tensor],
    usual: Tensor,
    exact: Tensor,
    denoiser: Denoiser,
    clips: int,
) -> None:
    """Raise unless a denoiser is as good as the usual way, for as many rows as clips have.

    Args:
        name: of the model.
        given: latents, timesteps and text of one clip with guidance.
        usual: what the stock network says of them, in the denoiser's type.
        exact: the same in float32.
        denoiser: what is checked.
        clips: how often the rows are repeated.

    Raises:
        WorkError: it errs more than twice as much.
    """
    latents, timesteps, text = (torch.cat([tensor] * clips) for tensor in given)
    with torch.inference_mode():
        ours = denoiser.predict(
            latents.to(usual.dtype), timesteps, text.to(usual.dtype), NO_CONTROLS
        )
    require_as_good(name, ours, torch.cat([usual] * clips), torch.cat([exact] * clips))


def _refuse_unchecked() -> None:
    raise WorkError(
        "bench gpu: a model must have been compared with stock to be timed compiled, and was not"
    )


def require_as_good(name: str, ours: Tensor, usual: Tensor, exact: Tensor) -> None:
    """Raise unless ours errs at most twice as much as the usual way, against float32.

    Raises:
        WorkError: it does not.
    """
    largest = float(exact.abs().max())
    wanted = exact.double()
    error, theirs = (float((got.double() - wanted).abs().max()) for got in (ours, usual))
    # In float32 nothing is known to be nearer the truth: the stated tolerance is asked for.
    unit = 1e-4 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps
    allowed = _SLACK * theirs + unit * largest
    if not error <= allowed:
        raise WorkError(
            f"{name}: our network must err at most {allowed:.3g} in {ours.dtype}, twice what the "
            f"stock one does, errs {error:.3g}"
        )


def _prediction_inputs(model: FullSize, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and text of a clip with guidance."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(model.latents, generator=generator).to(device)
    text = torch.randn((2, *model.text), generator=generator).to(device)
    return torch.stack([latents, latents]), torch.full((2,), _TIMESTEP, device=device), text


class Stock:
    """The stock pipeline over a subject's network and VAE, our modules taken out meanwhile.

    Args:
        subject: whose network is borrowed.
        network: what runs instead of it, such as its compiled form.
    """

    def __init__(self, subject: Subject, network: Any = None) -> None:
        self.subject = subject
        self.pipeline = _pipeline(subject, network)

    def clips(self, count: int, *, steps: int, latent: bool = False) -> Tensor:
        """Clips as `prepared` makes them, or latents [count, channels, frames, h, w]."""
        call = self.prepared(count, steps=steps, latent=latent)
        with self.borrowing():
            return call()

    def prepared(self, count: int, *, steps: int, latent: bool = False) -> Callable[[], Tensor]:
        """What makes the clips inside `borrowing`, and does nothing that stock would not do.

        They end as ours do, as bytes in the CPU's memory, [count, frames, h, w, channels], and by
        the quickest way there: rounded where they were decoded. The pipeline's own arrays are
        float32, four times as much to be moved.
        """
        subject = self.subject
        text, negative = (
            subject.encode_text(prompt).to(subject.dtype).expand(count, -1, -1)
            for prompt in ("a red circle", "")
        )
        noise = self._noise(count)

        def call() -> Tensor:
            out = self.pipeline(
                num_frames=subject.frames,
                height=subject.height,
                width=subject.width,
                num_inference_steps=steps,
                guidance_scale=subject.guidance_scale,
                latents=noise,
                prompt_embeds=text,
                negative_prompt_embeds=negative,
                output_type="latent" if latent else "pt",
            )
            video: Tensor = out.frames
            if latent:
                return video
            return (255 * video).round().byte().movedim(2, -1).contiguous().cpu()

        return call

    @contextlib.contextmanager
    def borrowing(self) -> Iterator[None]:
        """Inside, the network is the stock one, and deprecations are not said."""
        denoiser = self.subject.engine.denoiser
        assert isinstance(denoiser, EagerDenoiser)
        with without_ours(denoiser), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def _noise(self, count: int) -> Tensor:
        """What our clips of the seeds 0, 1 and so on start from."""
        subject = self.subject
        scale = subject.engine.vae_scale
        channels = subject.engine.checkpoint.unet.config.in_channels
        shape = channels, subject.frames, subject.height // scale, subject.width // scale
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            for seed in range(count)
        ]
        return torch.stack(noise).to(subject.device, subject.dtype)


@contextlib.contextmanager
def without_ours(denoiser: EagerDenoiser) -> Iterator[None]:
    """Inside, the network is the stock one."""
    denoiser.detach()
    try:
        yield
    finally:
        denoiser.attach()


@contextlib.contextmanager
def compiled(subject: Subject) -> Iterator[Subject]:
    """The same model with its network compiled; all that was compiled is let go of at the end."""
    engine = subject.engine
    assert isinstance(engine.denoiser, EagerDenoiser)
    with without_ours(engine.denoiser):
        denoiser = CompiledDenoiser(engine.checkpoint.unet).attach()
        try:
            yield replace(subject, engine=Engine(engine.checkpoint, denoiser, backend=COMPILED))
        finally:
            denoiser.detach()


def compilations(subject: Subject) -> int:
    """How often the network of a model of `compiled` was compiled."""
    assert isinstance(subject.engine.denoiser, CompiledDenoiser)
    return subject.engine.denoiser.compilations


@contextlib.contextmanager
def eagerly(subject: Subject) -> Iterator[None]:
    """Inside, a model with its network compiled runs it as it is."""
    assert isinstance(subject.engine.denoiser, CompiledDenoiser)
    with subject.engine.denoiser.eagerly():
        yield


def _pipeline(subject: Subject, network: Any) -> Any:
    import diffusers

    checkpoint = subject.engine.checkpoint
    parts: dict[str, Any] = {
        "vae": checkpoint.vae,
        "unet": checkpoint.unet if network is None else network,
        "text_encoder": None,
        "tokenizer": None,
        "scheduler": diffusers.DDIMScheduler(**checkpoint.scheduler_config),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of the two announces its deprecation
        if checkpoint.family == "animatediff":
            pipeline = diffusers.AnimateDiffPipeline(**parts, motion_adapter=None)
        else:
            pipeline = diffusers.TextToVideoSDPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_embedding(subject: Subject, seed: int) -> MotionEmbedding:
    """A motion embedding of random numbers at all temporal sites of up and down blocks."""
    generator = torch.Generator().manual_seed(seed)
    engine = subject.engine
    query_key, value = {}, {}
    for site in engine.denoiser.sites:
        if site.kind is SiteKind.TEMPORAL and site.place in ("down", "up"):
            size = site_size(engine.checkpoint.unet, site.name, LEARNED_SIZE)
            noise = torch.randn((subject.frames, *size, site.width), generator=generator)
            value[site.name] = _STRENGTH * noise
            query_key[site.name.rpartition(".")[0]] = _STRENGTH * noise[:, 0, 0]
    return MotionEmbedding(query_key=query_key, value=value, info=_info(subject, "embedding"))


def random_lora(subject: Subject, seed: int, **switches: Any) -> MotionLora:
    """A motion LoRA of random numbers on the keys of all temporal sites."""
    generator = torch.Generator().manual_seed(seed)
    network = subject.engine.checkpoint.unet
    down, up = {}, {}
    for path in lora_paths(network, subject.engine.family):
        outs, ins = network.get_submodule(path).weight.shape
        down[path] = torch.randn(_RANK, ins, generator=generator) * ins**-0.5
        up[path] = torch.randn(outs, _RANK, generator=generator) * _RANK**-0.5
    return MotionLora(down, up, info=_info(subject, "lora"), **switches)


def _info(subject: Subject, kind: str) -> MotionInfo:
    height, width = LEARNED_SIZE
    return MotionInfo(
        kind=kind,
        family=subject.engine.family.name,
        frames=subject.frames,
        height=height,
        width=width,
        checkpoint=subject.name,
    )
