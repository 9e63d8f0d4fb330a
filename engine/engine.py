"""The engine: requests in, clips out."""

import functools
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import attrs
import torch
from torch import Tensor

from kinetiq.backend_choice import take_backend
from kinetiq.backends import (
    AUTO,
    EAGER,
    EXPORTED,
    attach_denoiser,
    check_backend,
    check_machine,
    load_exported,
    usual_device,
)
from kinetiq.board_run import BoardLatents
from kinetiq.checkpoint import SETTINGS, Checkpoint, load_checkpoint
from kinetiq.clip import Clip
from kinetiq.control_tensors import LoraBank, MotionBank
from kinetiq.controls import Learned, LearnedMotion, resolve_controls
from kinetiq.denoiser import Denoiser, EagerDenoiser
from kinetiq.errors import (
    CheckpointError,
    InputError,
    KinetiqError,
    NonFiniteError,
    RequestError,
    WorkError,
)
from kinetiq.families import FAMILIES, Family
from kinetiq.generation import Progress, denoise, in_order, is_out_of_memory, no_progress
from kinetiq.inversion import invert
from kinetiq.moft import MotionChannels, load_channels, reference_feature
from kinetiq.moft_guidance import MoftGuidance, ResolvedMoftGuidance, resolve_moft_guidance
from kinetiq.motion_embedding import (
    BankRequest,
    MakeBanks,
    make_banks,
    resolve_motion_embedding,
    resolve_motion_noise,
)
from kinetiq.motion_lora import (
    LoraBankRequest,
    MakeLoraBanks,
    MotionLora,
    make_lora_banks,
    resolve_motion_lora,
)
from kinetiq.precision import exact_float32
from kinetiq.profiling import span
from kinetiq.request import Request, ResolvedRequest
from kinetiq.sampler import build_sampler_table
from kinetiq.shots import ConsistentShots, ResolvedShots, ShotBoard, resolve_shots
from kinetiq.skips import Skip, list_skips
from kinetiq.source import ResolvedSource, Source, resolve_source
from kinetiq.taps import DEFAULT_TAP, find_tap
from kinetiq.text import encode_prompts, find_words

MAX_CLIPS = 8
_DECODED_FRAMES = 16  # frames the VAE decodes at a time, as diffusers does
_KEPT_SOURCES = 16  # encoded references, prompts and learned motions that one call keeps
_KEPT_PROMPTS = 256
_KEPT_FEATURES = 4  # of references: each may be as large as a network's activations
_KEPT_MOTIONS = 16


@attrs.frozen
class Defaults:
    """What a request leaves out, for one checkpoint; `kinetiq.json` in its folder may say it."""

    frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    fps: float


Encode = Callable[[Source, int, int, int], ResolvedSource]
_Kinds = tuple[type[Request | ConsistentShots], ...]


@attrs.frozen
class Makers:
    """What bring motions to the network; ones that remember make each once.

    Args:
        embedding: the banks of an embedding.
        lora: the matrices of a LoRA.
        channels: the motion channels of a tap.
        features: of a clip at a number of frames, a height, a width and a tap.
        inverted: the noise of a clip at a number of frames, a height and a width.
    """

    embedding: MakeBanks
    lora: MakeLoraBanks
    channels: Callable[[str], MotionChannels]
    features: Callable[[Clip, int, int, int, str], Tensor]
    inverted: Callable[[Clip, int, int, int], Tensor]


class Engine:
    """A loaded model that turns requests into clips.

    Use `Engine.load`; a `with` block detaches the network at its end.
    """

    def __init__(self, checkpoint: Checkpoint, denoiser: Denoiser, *, backend: str = EAGER) -> None:
        self.checkpoint = checkpoint
        self.denoiser = denoiser
        self.backend = backend
        self.family: Family = FAMILIES[checkpoint.family]
        self.vae_scale = 2 ** (len(checkpoint.vae.config.block_out_channels) - 1)
        self.defaults = read_defaults(checkpoint, self.family, self.vae_scale)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        motion_adapter: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        backend: str = EAGER,
        network: str | Path | None = None,
        trust: str | Collection[str] = (),
        variant: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "Engine":
        """Load a model.

        Args:
            source: "sprites" (embedded), a diffusers folder, or a hub id.
            motion_adapter: folder or hub id of an AnimateDiff motion adapter, where `source` is
                an image model.
            device: "cpu", "cuda" or "cuda:<index>"; None: a GPU for the back ends that run on
                nothing else, and the CPU for the others.
            dtype: "float32", "bfloat16" or "float16"; None is float32.
            backend: what runs the denoiser; one of `kinetiq.backends.BACKENDS`, or "auto" for the
                fastest that was recorded to be exact here; see `kinetiq.backend_choice`.
            network: an export of the model that the back end runs, or an engine of TensorRT. None:
                the model is exported to the user's cache, once, and an engine for the GPU at hand
                is built there; one of "tensorrt" without `QueryInjection(reduce_leak=True)`, which
                only an engine takes that is built with the control "reduced".
            trust: SHA-256 checksums of engines that you vouch for, since an engine is code.
            variant: of the weights files, such as "fp16".
            revision: branch, tag or commit of a hub repository.
            local_files_only: use only what is downloaded already.

        Raises:
            CheckpointError: the model cannot be loaded.
            RequestError: an option has no meaning.
            MissingDependencyError: the device, or a package of the back end, is not there.
        """
        check_backend(backend, network, trust)
        device = usual_device(backend) if device is None else device
        if backend in EXPORTED:
            check_machine(backend, device)
        checkpoint = load_checkpoint(
            source,
            motion_adapter=motion_adapter,
            device=device,
            dtype=dtype,
            variant=variant,
            revision=revision,
            local_files_only=local_files_only,
        )
        if backend == AUTO:
            backend = take_backend(checkpoint.dtype, checkpoint.device)
        if backend in EXPORTED:
            denoiser = load_exported(backend, checkpoint, network, trust)
        else:
            denoiser = attach_denoiser(backend, checkpoint)
        return cls(checkpoint, denoiser, backend=backend)

    def close(self) -> None:
        """Take our modules out of the network again."""
        if isinstance(self.denoiser, EagerDenoiser):
            self.denoiser.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def generate(
        self, prompt: str, control: Any = None, *, progress: Progress = no_progress, **options: Any
    ) -> Clip:
        """Generate one clip; the options are those of `Request`."""
        request = Request.from_options(prompt, {"control": control, **options})
        return next(self.generate_many([request], progress=progress))

    @overload
    def generate_many(
        self,
        requests: Iterable[Request],
        *,
        on_error: Literal["raise"] = "raise",
        max_clips: int = MAX_CLIPS,
        progress: Progress = no_progress,
    ) -> Iterator[Clip]: ...

    @overload
    def generate_many(
        self,
        requests: Iterable[Request],
        *,
        on_error: Literal["return"],
        max_clips: int = MAX_CLIPS,
        progress: Progress = no_progress,
    ) -> Iterator[Clip | KinetiqError]: ...

    @overload
    def generate_many(
        self,
        requests: Iterable[Request | ConsistentShots],
        *,
        on_error: str = "raise",
        max_clips: int = MAX_CLIPS,
        progress: Progress = no_progress,
    ) -> Iterator[Clip | ShotBoard | KinetiqError]: ...

    def generate_many(
        self,
        requests: Iterable[Request | ConsistentShots],
        *,
        on_error: str = "raise",
        max_clips: int = MAX_CLIPS,
        progress: Progress = no_progress,
    ) -> Iterator[Clip | ShotBoard | KinetiqError]:
        """Generate clips in batches and yield them in the order of the requests.

        Prompts, seeds, step counts, samplers, guidance and controls may all differ within a
        batch; clips of another shape wait until those before them are done. Requests are drawn
        as room allows, so `requests` may be endless. Boards of shots may be among them; each
        becomes a `ShotBoard` in its place.

        Args:
            requests: what to generate.
            on_error: "raise" what goes wrong when its turn comes, or "return" it in the clip's
                place and go on.
            max_clips: clips in a batch.
            progress: told of ("denoising" or "decoding", done, total), and where a guidance needs
                it, before, of ("calibrating" or "inverting", done, total).
        """
        return self._generate(requests, on_error, max_clips, progress)

    def _generate(
        self,
        requests: Iterable[Request | ConsistentShots],
        on_error: str,
        max_clips: int,
        progress: Progress,
        kinds: _Kinds = (Request, ConsistentShots),
    ) -> Iterator[Clip | ShotBoard | KinetiqError]:
        if on_error not in ("raise", "return"):
            raise RequestError(f"on_error: must be 'raise' or 'return', got {on_error!r}")
        for sampled, request in in_order(self._sample(requests, max_clips, progress, kinds)):
            result = self._decode_result(sampled, request, progress)
            if on_error == "raise" and isinstance(result, KinetiqError):
                raise result
            yield result

    def generate_as_completed(
        self,
        requests: Iterable[Request | None],
        *,
        max_clips: int = MAX_CLIPS,
        progress: Progress = no_progress,
    ) -> Iterator[tuple[int, Clip | KinetiqError]]:
        """Generate clips in batches and yield each, or what goes wrong with it, once it is done.

        The arguments are those of `generate_many`, but that None may be among the requests, for
        none at this moment: clips that are under way go on by a step before the next is asked for.
        Where none is under way it is asked for at once, so `requests` should wait then by itself.

        Yields:
            The place of the request, from 0, None not counted, and what came of it.
        """
        results = self._sample(requests, max_clips, progress, (Request,), may_wait=True)
        for place, (sampled, request) in results:
            result = self._decode_result(sampled, request, progress)
            yield place, result  # type: ignore[misc]  # requests in, clips out

    def _decode_result(
        self,
        sampled: Tensor | BoardLatents | KinetiqError,
        request: Any,  # what it was sampled from
        progress: Progress,
    ) -> Clip | ShotBoard | KinetiqError:
        if isinstance(sampled, KinetiqError):
            return sampled
        try:
            if isinstance(sampled, Tensor):
                return self.decode(sampled, request.fps, progress)
            clips = tuple(
                self.decode(latents, shot.fps, progress)
                for latents, shot in zip(sampled.latents, request.requests, strict=True)
            )
        except KinetiqError as error:
            return error
        return ShotBoard(clips, None if sampled.masks is None else sampled.masks.numpy())

    def generate_shots(
        self, shots: ConsistentShots, *, progress: Progress = no_progress
    ) -> list[Clip]:
        """Generate the shots of one board; see `ConsistentShots`."""
        return list(next(self.generate_storyboards([shots], progress=progress)).clips)

    @overload
    def generate_storyboards(
        self,
        boards: Iterable[ConsistentShots],
        *,
        on_error: Literal["raise"] = "raise",
        max_clips: int = MAX_CLIPS,
        progress: Progress = no_progress,
    ) -> Iterator[ShotBoard]: ...

    @overload
    def generate_storyboards(
        self,
        boards: Iterable[ConsistentShots],
        *,
        on_error: Literal["return"],
        max_clips: int = MAX_CLIPS,
        progress: Progress = no_progress,
    ) -> Iterator[ShotBoard | KinetiqError]: ...

    def generate_storyboards(
        self,
        boards: Iterable[ConsistentShots],
        *,
        on_error: str = "raise",
        max_clips: int = MAX_CLIPS,
        progress: Progress = no_progress,
    ) -> Iterator[ShotBoard | KinetiqError]:
        """Generate boards of shots in batches and yield them in their order.

        The arguments but the first are those of `generate_many`, which takes boards among its
        requests too. The clips that a board has at a time, its shots left alone among them, are
        never in different batches, whatever `max_clips` says.
        """
        results = self._generate(boards, on_error, max_clips, progress, (ConsistentShots,))
        yield from results  # type: ignore[misc]  # boards in, boards out

    def generate_latents(
        self,
        requests: Iterable[Request],
        *,
        max_clips: int = MAX_CLIPS,
        progress: Progress = no_progress,
    ) -> Iterator[Tensor]:
        """Like `generate_many`, without decoding: [channels, frames, h, w] a request.

        Raises:
            RequestError: a board is among them, which becomes more than one clip.
        """
        sampled = self._sample(requests, max_clips, progress, (Request,))
        for latents, _ in in_order(sampled):
            if isinstance(latents, KinetiqError):
                raise latents
            yield latents

    def _sample(
        self,
        requests: Iterable[Request | ConsistentShots | None],
        max_clips: int,
        progress: Progress,
        kinds: _Kinds = (Request, ConsistentShots),
        may_wait: bool = False,
    ) -> Iterator[tuple[int, tuple[Tensor | BoardLatents | KinetiqError, Any]]]:
        """(index, (latents or error, resolved request or None)), each as it is done."""
        if max_clips < 1:
            raise RequestError(f"max_clips: must be at least 1, got {max_clips}")
        resolved: dict[int, ResolvedRequest | ResolvedShots] = {}

        @functools.lru_cache(maxsize=_KEPT_PROMPTS)
        def encode_text(prompt: str) -> Tensor:
            with span("text"), _room_for("encode: a prompt"):
                return encode_prompts(self.checkpoint, [prompt])[0]

        encode_reference = self._reference_encoder()
        make = self._makers(encode_reference, progress)

        def resolve_all() -> Iterator[
            tuple[int, ResolvedRequest | ResolvedShots | KinetiqError] | None
        ]:
            places = itertools.count()
            for request in requests:
                if request is None and may_wait:
                    yield None
                    continue
                index = next(places)
                try:
                    asked = _require_kind(request, kinds)
                    if isinstance(asked, ConsistentShots):
                        resolved[index] = self.resolve_shots(asked, encode_reference, make)
                    else:
                        resolved[index] = self.resolve(asked, encode_reference, make)
                except KinetiqError as error:
                    yield index, error
                else:
                    yield index, resolved[index]

        results = denoise(
            resolve_all(),
            self.denoiser,
            encode_text,
            channels=self.checkpoint.unet.config.in_channels,
            device=self.checkpoint.device,
            dtype=self.checkpoint.dtype,
            max_clips=max_clips,
            decode=lambda latents: self._pixels(latents).cpu().numpy(),
            progress=progress,
        )
        for index, result in results:
            yield index, (result, resolved.pop(index, None))

    def resolve(
        self,
        request: Request,
        encode_reference: Encode | None = None,
        make: Makers | None = None,
    ) -> ResolvedRequest:
        """Fill in the checkpoint's defaults, resolve the controls, and check everything.

        Raises:
            RequestError: an option, or a combination of options, has no meaning here.
            CheckpointError: a learned motion was made for another model.
            NonFiniteError: features of a reference are not finite.
        """
        if not isinstance(request, Request):
            raise RequestError(f"request: must be a Request, got {type(request).__name__}")
        defaults = self.defaults
        frames = request.frames or defaults.frames
        height, width = request.height or defaults.height, request.width or defaults.width
        self._check_size(height, width)
        self._check_frames(frames)
        guidance = request.guidance_scale
        table = build_sampler_table(
            request.sampler or self.checkpoint.scheduler,
            self.checkpoint.scheduler_config,
            request.steps or defaults.steps,
            eta=request.eta,
        )
        encode = encode_reference or self._reference_encoder()
        make = make or self._makers(encode)
        shape = (frames, height // self.vae_scale, width // self.vae_scale)
        controls = resolve_controls(
            request.control,  # type: ignore[arg-type]  # the converter made it a tuple
            lambda source: encode(source.read_by(request.prompt), frames, height, width),
            table.steps,
            self.denoiser.sites,
            lambda control: self._learned(control, shape, table.steps, make),
            lambda control: self._guidance(control, shape, table.steps, make),
            lambda source: make.inverted(source.reference, frames, height, width),
        )
        return ResolvedRequest(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=request.seed,
            guidance_scale=defaults.guidance_scale if guidance is None else float(guidance),
            frames=frames,
            latent_height=shape[1],
            latent_width=shape[2],
            fps=request.fps or defaults.fps,
            sampler=table,
            controls=controls,
        )

    def resolve_shots(
        self,
        shots: ConsistentShots,
        encode_reference: Encode | None = None,
        make: Makers | None = None,
    ) -> ResolvedShots:
        """The same for a board of shots.

        Raises:
            InputError: what `resolve` raises, with the shot that it is about.
            RequestError: a prompt does not hold the subject where the text encoder reads, masks
                do not fit, or the network or the back end cannot do what is asked.
        """
        require_eager_for_shots(self.backend)
        encode = encode_reference or self._reference_encoder()
        make = make or self._makers(encode)
        requests, words = [], []
        for number, request in enumerate(shots.requests(), start=1):
            try:
                requests.append(self.resolve(request, encode, make))
                words.append(find_words(self.checkpoint.tokenizer, request.prompt, shots.subject))
            except InputError as error:
                raise type(error)(f"shots: shot {number}: {error}") from error
        resolved = resolve_shots(shots, tuple(requests), tuple(words))
        if resolved.reads_features:
            option = "refine" if resolved.refined[1] > 0 else "flow"
            try:
                find_tap(self.checkpoint.unet, DEFAULT_TAP)
            except RequestError as error:
                raise RequestError(
                    f"{option}: must be left out here, since it matches features that this "
                    f"network does not have: {error}"
                ) from error
        return resolved

    @torch.inference_mode()
    def encode(self, clip: Clip) -> Tensor:
        """Scaled latents of a clip, [channels, frames, h, w], float32; the posterior's mode.

        Raises:
            NonFiniteError: a latent is not finite.
            WorkError: memory ran out.
        """
        vae = self.checkpoint.vae
        pixels = (clip.to_tensor() * 2 - 1).to(self.checkpoint.device, self.checkpoint.dtype)
        room = _room_for(f"encode: {min(len(pixels), _DECODED_FRAMES)} frames")
        with span("encode"), exact_float32(), room:
            parts = [vae.encode(part).latent_dist.mode() for part in pixels.split(_DECODED_FRAMES)]
        latents: Tensor = torch.cat(parts).float().transpose(0, 1) * vae.config.scaling_factor
        if not bool(latents.isfinite().all()):
            raise NonFiniteError(
                f"encode: latents of {clip!r} must be finite, got NaN or infinity from the VAE; "
                "try dtype float32 or bfloat16"
            )
        return latents

    @torch.inference_mode()
    def decode(self, latents: Tensor, fps: float, progress: Progress = no_progress) -> Clip:
        """The clip of scaled latents [channels, frames, h, w].

        Raises:
            NonFiniteError: a pixel is not finite.
            WorkError: memory ran out.
        """
        pixels = self._pixels(latents, progress)
        # As `Clip.from_array` rounds, but where the frames are: a GPU sends a quarter of the bytes.
        with _room_for(f"decode: {len(pixels)} frames as bytes"):
            frames = (pixels * 255.0 + 0.5).floor().to(torch.uint8)
        return Clip.from_array(frames, fps)

    @torch.inference_mode()
    def _pixels(self, latents: Tensor, progress: Progress = no_progress) -> Tensor:
        """The frames of scaled latents, float32 [frames, height, width, 3], 0 to 1."""
        vae = self.checkpoint.vae
        frames = (latents / vae.config.scaling_factor).transpose(0, 1)
        parts = frames.to(self.checkpoint.dtype).split(_DECODED_FRAMES)
        pixels = []
        for number, part in enumerate(parts):
            with span("decode"), exact_float32(), _room_for(f"decode: {len(part)} frames"):
                pixels.append(vae.decode(part).sample.float())
            progress("decoding", number + 1, len(parts))
        video = torch.cat(pixels) / 2 + 0.5
        if not bool(video.isfinite().all()):
            raise NonFiniteError(
                "decode: pixels must be finite, got NaN or infinity from the VAE; try dtype float32"
            )
        return video.clamp(0, 1).permute(0, 2, 3, 1)

    def _reference_encoder(self) -> Encode:
        """Encodes references to the size of the clips they steer, each once."""

        @functools.lru_cache(maxsize=_KEPT_SOURCES)
        def latents(clip: Clip, frames: int, height: int, width: int) -> Tensor:
            return self.encode(clip.resample(frames).resize(height, width))

        def encode(source: Source, frames: int, height: int, width: int) -> ResolvedSource:
            if frames < 2:
                raise RequestError(
                    f"frames: must be at least 2 where a reference gives the motion, got {frames}"
                )
            return resolve_source(source, latents(source.reference, frames, height, width))

        return encode

    def _makers(self, encode: Encode, progress: Progress = no_progress) -> Makers:
        """Bring motions to the network, each once: embeddings and references a size."""
        network, family, sites = self.checkpoint.unet, self.family, self.denoiser.sites

        @functools.lru_cache(maxsize=_KEPT_MOTIONS)
        def of_embedding(asked: BankRequest) -> dict[int, MotionBank]:
            with span("motion"), _room_for("motion: the banks of one"):
                return make_banks(asked, network, family, sites)

        @functools.lru_cache(maxsize=_KEPT_MOTIONS)
        def of_lora(asked: LoraBankRequest) -> dict[str, LoraBank]:
            with span("motion"), _room_for("motion: the matrices of a LoRA"):
                return make_lora_banks(asked, network, family)

        @functools.cache
        def channels(tap: str) -> MotionChannels:
            on_cpu = self.checkpoint.device.type == "cpu"
            narrower = "bfloat16" if on_cpu else "bfloat16 or float16"  # which no CPU is given
            pans = (
                "motion: the pans that show a tap's channels, one by one at the model's own size,"
            )
            with span("motion"), _room_for(pans, f"try {narrower}, or another device"):
                return load_channels(self.checkpoint, self.denoiser, tap, progress=progress)

        @functools.lru_cache(maxsize=_KEPT_FEATURES)
        def features(clip: Clip, frames: int, height: int, width: int, tap: str) -> Tensor:
            latents = encode(Source(clip), frames, height, width).latents
            advice = "ask for fewer frames or a smaller size"
            with span("motion"), _room_for("motion: the features of a reference", advice):
                return reference_feature(
                    self.checkpoint, self.denoiser, latents, tap, progress=progress
                )

        @functools.lru_cache(maxsize=_KEPT_SOURCES)
        def inverted(clip: Clip, frames: int, height: int, width: int) -> Tensor:
            latents = encode(Source(clip), frames, height, width).latents
            with span("motion"), _room_for("motion: the inversion of a reference"):
                return invert(self.checkpoint, self.denoiser, latents)

        return Makers(of_embedding, of_lora, channels, features, inverted)

    @functools.cached_property
    def _skips(self) -> tuple[Skip, ...]:
        return list_skips(self.checkpoint.unet, self.family)

    def _learned(
        self, control: LearnedMotion, shape: tuple[int, int, int], steps: int, make: Makers
    ) -> Learned:
        """A learned motion as data for a clip of `shape`."""
        if shape[0] < 2:
            raise RequestError(
                f"frames: must be at least 2 where a motion is given, got {shape[0]}"
            )
        network, family = self.checkpoint.unet, self.family
        noise = resolve_motion_noise(control, network.config.in_channels, shape)
        if isinstance(control, MotionLora):
            lora = resolve_motion_lora(control, network, family, self._skips, steps, make.lora)
            return lora, noise
        embedding = resolve_motion_embedding(
            control, network, family, self.denoiser.sites, shape, steps, make.embedding
        )
        return embedding, noise

    def _guidance(
        self, control: MoftGuidance, shape: tuple[int, int, int], steps: int, make: Makers
    ) -> ResolvedMoftGuidance:
        """A guidance as data for a clip of `shape`."""
        if self.backend in EXPORTED:
            _require_eager(self.backend, "MoftGuidance, which needs gradients")
        if control.recompute is True and not isinstance(self.denoiser, EagerDenoiser):
            raise RequestError(
                f"recompute: the back end must be eager, got {type(self.denoiser).__name__}; "
                "leave it out"
            )
        tap = find_tap(self.checkpoint.unet, control.tap)
        frames, height, width = shape[0], shape[1] * self.vae_scale, shape[2] * self.vae_scale
        with torch.inference_mode(False):  # what guidance differentiates is made here
            return resolve_moft_guidance(
                control,
                shape=shape,
                size=(height, width),
                steps=steps,
                tap=tap,
                sites=self.denoiser.sites,
                channels_of=lambda: make.channels(tap.name),
                features_of=lambda clip: make.features(clip, frames, height, width, tap.name),
                device=self.checkpoint.device,
            )

    def _check_size(self, height: int, width: int) -> None:
        """Raise unless the model has clips of this size, and its back end takes them."""
        halved = self.denoiser.multiple
        where, advice = "", ""
        if halved > 1:
            where, advice = f" on {self.backend}", "; or load the model with backend='eager'"
        for name, pixels in {"height": height, "width": width}.items():
            if pixels % (self.vae_scale * halved):
                raise RequestError(
                    f"{name}: must be a multiple of {self.vae_scale * halved} for "
                    f"{self.checkpoint.name}{where}, got {pixels}{advice}"
                )

    def _check_frames(self, frames: int) -> None:
        limit = getattr(self.checkpoint.unet.config, "motion_max_seq_length", None)
        if limit is not None and frames > limit:
            raise RequestError(
                f"frames: must be at most {limit}, the positions that {self.checkpoint.name} "
                f"knows, got {frames}"
            )


@contextmanager
def _room_for(what: str, advice: str = "ask for a smaller size") -> Iterator[None]:
    """Say it in words when memory runs out in the block."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise WorkError(f"{what} must fit in memory, and do not; {advice}") from error


def require_eager_for_shots(backend: str) -> None:
    """Raise a `RequestError` unless a back end can generate boards of shots."""
    _require_eager(backend, "ConsistentShots, which look into the network")


def _require_eager(backend: str, what: str) -> None:
    if backend != EAGER:
        raise RequestError(
            f"request: backend must be {EAGER!r} for {what}, got {backend!r}; load the model "
            f"with backend={EAGER!r}"
        )


def _require_kind(request: object, kinds: _Kinds) -> Request | ConsistentShots:
    if isinstance(request, kinds):
        return request
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise RequestError(
        f"request: must be a {wanted} here, got {type(request).__name__}; generate_many takes "
        "requests and boards of shots, generate_storyboards boards, generate_latents requests"
    )


def read_defaults(checkpoint: Checkpoint, family: Family, vae_scale: int) -> Defaults:
    """The checkpoint's own defaults where `kinetiq.json` says them, else the family's.

    Raises:
        CheckpointError: `kinetiq.json` is not of the right form.
    """
    sample_size = checkpoint.unet.config.sample_size or 64
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    values: dict[str, Any] = {
        "frames": family.frames,
        "height": height * vae_scale,
        "width": width * vae_scale,
        "steps": family.steps,
        "guidance_scale": family.guidance_scale,
        "fps": family.fps,
    }
    path = None if checkpoint.path is None else Path(checkpoint.path) / SETTINGS
    if path is not None and path.exists():
        try:
            said = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"load: {path} must be JSON: {error}") from error
        if not isinstance(said, dict) or not set(said) <= set(values) or None in said.values():
            raise CheckpointError(
                f"load: {path} must map {', '.join(values)} to numbers, got {said}"
            )
        try:
            Request("any", **said)  # a default must be what a request may say
        except RequestError as error:
            raise CheckpointError(f"load: {path}: {error}") from error
        values |= said
    return Defaults(**values)
