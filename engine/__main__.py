"""The command line: `kinetiq demo | generate | train | analyze | convert | doctor | bench`."""

import json
import re
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import kinetiq.kernels
from kinetiq.command_line import PlainGroup
from kinetiq.errors import CheckpointError, ClipError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from kinetiq.clip import Clip
    from kinetiq.controls import Control, LearnedMotion

# `python -m kinetiq` puts the working directory on the path; in a checkout our folder `kernels`
# would then answer for the package of that name that transformers and diffusers probe for. They
# are imported later, when they are used.
_OWN_KERNELS = Path(kinetiq.kernels.__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry, "kernels").resolve() != _OWN_KERNELS]

CONTROLS = ("motion", "query", "both", "none")
_SHARED = ("until", "halves", "region")
_LEARNED = ("until", "halves", "motion_scale", "noise_prior")
_SWITCHES = {  # of each kind of control: the options that it takes
    "motion": (*_SHARED, "parts"),
    "query": (*_SHARED, "sites", "reduce_leak"),
    "embedding": (*_LEARNED, "value_scale", "debias"),
    "lora": (*_LEARNED, "highway", "beta"),
}
_SITE_WORDS = ("spatial", "temporal", "both")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"

_Function = TypeVar("_Function", bound="Callable[..., Any]")


class MainGroup(PlainGroup):
    """The command line as a whole."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """The commands in the order in which a new user wants them."""
        return [*self.commands, "bench"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command; the benches are imported only when they are asked for."""
        if cmd_name == "bench":
            from kinetiq.bench.command import bench

            return bench
        return super().get_command(ctx, cmd_name)


@click.group("kinetiq", cls=MainGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kinetiq")
def main() -> None:
    """Generate video whose motion is chosen by a reference clip and whose content by a prompt."""


def _device_options(function: _Function) -> _Function:
    options = [
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
        click.option("--dtype", help="float32 (default), bfloat16 or float16."),
        click.option("--backend", default="eager", show_default=True, help="Runs the network."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("kinetiq-demo"),
    show_default=True,
    help="Folder for the clips, the sheet and report.json.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--steps", type=int, help="Sampler steps.")
@click.option("--guidance", type=float, help="Guidance scale; 1 is none.")
@click.option("--until", type=float, help="Share of the steps that are steered, 0 to 1.")
@click.option("--frames", type=int, help="Frames of each clip.")
@click.option("--size", help="HEIGHTxWIDTH in pixels, a square such as 48x48.")
@click.option("--fps", type=float, help="Frames a second.")
@click.option("--json", "as_json", is_flag=True, help="Print what report.json says.")
@_device_options
def demo(
    out: Path,
    seed: int,
    steps: int | None,
    guidance: float | None,
    until: float | None,
    frames: int | None,
    size: str | None,
    fps: float | None,
    as_json: bool,
    device: str,
    dtype: str | None,
    backend: str,
) -> None:
    """Move three subjects like one reference, and measure how well."""
    from kinetiq.demo import DemoOptions, check_folder, describe, run_demo
    from kinetiq.engine import Engine
    from kinetiq.progress import progress_bars

    height, width = _parse_size("demo", size)
    if height != width:
        raise RequestError(f"demo: --size must be a square such as 48x48, got {size!r}")
    options = DemoOptions(
        seed=seed,
        steps=steps,
        guidance_scale=guidance,
        until=until,
        frames=frames,
        size=height,
        fps=fps,
    )
    check_folder(out)
    with progress_bars() as progress:
        progress("loading", 0, 1)
        with Engine.load("sprites", device=device, dtype=dtype, backend=backend) as engine:
            report = run_demo(engine, out, options, progress=progress)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(describe(report))
    click.echo(
        f"Clips, side-by-side.gif, sheet.png and report.json are in {click.format_filename(out)}"
    )


@main.command()
@click.option("--prompt", required=True, help="What the clip shows.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Clip whose motion is wanted: a video, a gif, a webp or a folder of images.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help=".mp4, .webm, .gif, .webp, or no suffix for a folder of images.",
)
@click.option(
    "--control",
    type=click.Choice(CONTROLS),
    help="motion (default with a reference): motion injection; query: query injection, "
    "the paper's; both; none (default without).",
)
@click.option("--until", type=float, help="Share of the steps that are steered, 0 to 1.")
@click.option(
    "--sites",
    help="spatial (default), temporal, both, or names of sites, comma-separated (query injection).",
)
@click.option(
    "--reduce-leak",
    is_flag=True,
    default=None,
    help="Keep the clip's own mean of the queries over frames (query injection).",
)
@click.option(
    "--parts", help="Which of q, k and v are injected; qkv by default (motion injection)."
)
@click.option(
    "--halves",
    type=click.Choice(("both", "cond")),
    help="Which halves of guidance are steered; both by default.",
)
@click.option(
    "--region",
    type=click.Path(path_type=Path),
    help="Image, or clip of as many frames, white where the reference's motion is wanted.",
)
@click.option(
    "--fit",
    type=click.Choice(("crop", "fit", "stretch")),
    help="How the reference is brought to the clip's size; crop by default.",
)
@click.option(
    "--motion",
    "motions",
    multiple=True,
    metavar="[WEIGHT*]FILE",
    help="A motion that was learned before, such as dance.safetensors or -0.5*dance.safetensors; "
    "several of a kind are added up, at the frames and the size of the first. Of an embedding and "
    "a LoRA, the first that has noise brings it, and the other's --noise-prior is 0.",
)
@click.option("--motion-scale", type=float, help="Factor on what --motion adds; 1 by default.")
@click.option(
    "--value-scale", type=float, help="Further factor on the value part of a motion embedding."
)
@click.option(
    "--debias",
    type=click.Choice(("difference", "none", "mean", "drop")),
    help="How appearance is kept out of a motion embedding: difference by default; drop leaves "
    "motions of the camera.",
)
@click.option(
    "--noise-prior",
    type=float,
    help="Share of the learned reference's own noise at the start, 0 to 1; 0.5 by default for a "
    "motion embedding, 0.2 for a LoRA.",
)
@click.option(
    "--highway",
    type=click.Choice(("all", "released")),
    help="Let skip connections bypass a LoRA's changes; none by default.",
)
@click.option("--beta", type=float, help="Strength of the --highway; 1.1 by default.")
@click.option("--negative-prompt", default="", help="What the clip does not show.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--steps", type=int, help="Sampler steps.")
@click.option("--guidance", type=float, help="Guidance scale; 1 is none.")
@click.option("--sampler", help="ddim, ddpm, euler, dpm++2m or lcm.")
@click.option("--eta", type=float, default=0.0, show_default=True, help="Noise of DDIM.")
@click.option("--frames", type=int, help="Frames of the clip.")
@click.option("--size", help="HEIGHTxWIDTH in pixels.")
@click.option("--fps", type=float, help="Frames a second.")
@click.option(
    "--scale",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Enlarge what is written by a whole number.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was made as one JSON object.")
@click.option(
    "--model",
    default="sprites",
    show_default=True,
    help="sprites (embedded), a diffusers folder, or a hub id.",
)
@click.option("--motion-adapter", help="AnimateDiff motion adapter for an image model.")
@_device_options
def generate(
    prompt: str,
    reference: Path | None,
    out: Path,
    control: str | None,
    until: float | None,
    sites: str | None,
    reduce_leak: bool | None,
    parts: str | None,
    halves: str | None,
    region: Path | None,
    fit: str | None,
    motions: tuple[str, ...],
    motion_scale: float | None,
    value_scale: float | None,
    debias: str | None,
    noise_prior: float | None,
    highway: str | None,
    beta: float | None,
    negative_prompt: str,
    seed: int,
    steps: int | None,
    guidance: float | None,
    sampler: str | None,
    eta: float,
    frames: int | None,
    size: str | None,
    fps: float | None,
    scale: int,
    as_json: bool,
    model: str,
    motion_adapter: str | None,
    device: str,
    dtype: str | None,
    backend: str,
) -> None:
    """Generate one clip, moving like a reference or as was learned."""
    import attrs

    from kinetiq.clip import Clip, check_write, peek
    from kinetiq.engine import Engine
    from kinetiq.injection import Injection
    from kinetiq.progress import progress_bars
    from kinetiq.request import Request

    # All that can be wrong with the options is said before a model loads.
    height, width = _parse_size("generate", size)
    options: dict[str, Any] = {
        "seed": seed,
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance_scale": guidance,
        "sampler": sampler,
        "eta": eta,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": fps,
    }
    Request.from_options(prompt, options)
    check_write(out, frames=frames, fps=fps)
    if reference is None and fit is not None:
        raise RequestError("generate: --fit needs --reference, got none")
    # The whole reference is read once the size is known that it is needed at, which the model says.
    start = None if reference is None else peek(reference)
    switches = {
        "until": until,
        "sites": sites,
        "reduce_leak": reduce_leak,
        "parts": parts,
        "halves": halves,
        "region": region,
        "motion_scale": motion_scale,
        "value_scale": value_scale,
        "debias": debias,
        "noise_prior": noise_prior,
        "highway": highway,
        "beta": beta,
    }
    given = {name: value for name, value in switches.items() if value is not None}
    learned = _read_motions(motions)
    controls = _build_controls(start, control, learned, given)
    with progress_bars() as progress:
        progress("loading", 0, 1)
        with Engine.load(
            model, motion_adapter=motion_adapter, device=device, dtype=dtype, backend=backend
        ) as engine:
            defaults = engine.defaults
            check_write(out, frames=frames or defaults.frames, fps=fps or defaults.fps)
            if reference is not None and controls:
                progress("reading", 0, 1)
                clip = Clip.read(
                    reference,
                    height=height or defaults.height,
                    width=width or defaults.width,
                    fit=fit or "crop",
                )
                controls = [
                    attrs.evolve(control, reference=clip)
                    if isinstance(control, Injection)
                    else control
                    for control in controls
                ]
            made = engine.generate(prompt, controls, progress=progress, **options)
    made.write(out, scale=scale)
    said = {
        "out": str(out),
        "frames": made.num_frames,
        "height": made.height * scale,
        "width": made.width * scale,
        "fps": made.fps,
        "seed": seed,
    }
    if as_json:
        click.echo(json.dumps(said))
        return
    count = "1 frame" if made.num_frames == 1 else f"{made.num_frames} frames"
    click.echo(
        f"{click.format_filename(out)}: {count} of {said['height']}x{said['width']} "
        f"(height x width), {made.fps:g} a second"
    )


@main.group()
def train() -> None:
    """Train a model."""


@train.command("sprites")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the run; one that was interrupted is continued.",
)
@click.option("--steps", type=click.IntRange(1), default=20_000, show_default=True)
@click.option(
    "--decay-steps",
    type=click.IntRange(1),
    default=3_000,
    show_default=True,
    help="Steps at the end over which the learning rate falls to zero.",
)
@click.option("--vae-steps", type=click.IntRange(1), default=2_500, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option(
    "--frame-share",
    type=click.FloatRange(0.0, 1.0),
    default=0.25,
    show_default=True,
    help="Share of the steps that learn from single frames.",
)
@click.option(
    "--noise-shift",
    type=click.FloatRange(1.0, 10.0),
    default=3.0,
    show_default=True,
    help="How far training on clips leans to noisy timesteps; 1 is uniform.",
)
@click.option(
    "--widening-steps",
    type=click.IntRange(0),
    default=5_000,
    show_default=True,
    help="Steps over which scenes widen from one a motion to all.",
)
@click.option("--learning-rate", type=float, default=6e-4, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads; PyTorch's own by default.")
@click.option(
    "--start-from",
    type=click.Path(path_type=Path),
    help="A finished checkpoint to start from; 'sprites' is the embedded one.",
)
@click.option("--save-every", type=click.IntRange(1), default=250, show_default=True)
@click.option(
    "--shards",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Parts of a batch that run side by side on a CPU, one thread each.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
def train_sprites(
    out: Path,
    steps: int,
    decay_steps: int,
    vae_steps: int,
    batch: int,
    frame_share: float,
    noise_shift: float,
    widening_steps: int,
    learning_rate: float,
    seed: int,
    threads: int | None,
    start_from: Path | None,
    save_every: int,
    shards: int,
    device: str,
) -> None:
    """Train the embedded sprites model."""
    from kinetiq.checkpoint import embedded_folder, resolve_device
    from kinetiq.progress import progress_bars, say_above_bar
    from kinetiq.sprites import training

    if not 0.0 < learning_rate <= 1.0:  # as it is for NaN
        raise RequestError(
            f"train: --learning-rate must be above 0 and at most 1, got {learning_rate:g}"
        )
    if start_from == Path("sprites"):
        start_from = embedded_folder()
    elif start_from is not None and not start_from.is_dir():
        raise CheckpointError(
            f"train: --start-from must be 'sprites' or the folder of a checkpoint, got {start_from}"
        )
    options = training.TrainingOptions(
        steps=steps,
        decay_steps=decay_steps,
        vae_steps=vae_steps,
        batch=batch,
        frame_share=frame_share,
        noise_shift=noise_shift,
        widening_steps=widening_steps,
        learning_rate=learning_rate,
        seed=seed,
        save_every=save_every,
        shards=shards,
        device=str(resolve_device(device)),
    )

    def report(line: training.TrainingStep) -> None:
        losses = {"loss": line.loss, "loss of single frames": line.frame_loss}
        said = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
        told = ", ".join([*said, f"{line.seconds:.0f} s"])
        say_above_bar(f"{line.stage} {line.step}: {told}")

    with (
        nullcontext() if threads is None else training.threads(threads),
        progress_bars() as progress,
    ):
        folder = training.train(
            out, options, start_from=start_from, report=report, progress=progress
        )
    click.echo(click.format_filename(folder))


def _motion_options(function: _Function) -> _Function:
    """What `train embedding` and `train lora` share; None is the default of the training."""
    options = [
        click.option(
            "--out",
            required=True,
            type=click.Path(path_type=Path),
            help="The motion's .safetensors file.",
        ),
        click.option(
            "--folder",
            type=click.Path(path_type=Path),
            help="Of the run, which is continued if it is there; OUT with the suffix .training "
            "by default.",
        ),
        click.option("--steps", type=int, help="Optimiser steps."),
        click.option("--learning-rate", type=float),
        click.option("--loss", help="hybrid (default), debiased, mse or vmc."),
        click.option("--frames", type=int, help="Frames of the motion; the model's by default."),
        click.option("--height", type=int, help="Pixels; the model's by default."),
        click.option("--width", type=int, help="Pixels; the model's by default."),
        click.option(
            "--fit",
            type=click.Choice(("crop", "fit", "stretch")),
            default="crop",
            show_default=True,
            help="How a reference is brought to that size.",
        ),
        click.option("--dropout", type=float, help="Share of low-rank changes left out."),
        click.option("--inversion-steps", type=int, help="Steps of the noise that goes with it."),
        click.option("--seed", type=int),
        click.option("--save-every", type=int, help="Steps between saves."),
        click.option(
            "--previews",
            type=int,
            help="Steps between early versions, each with a clip made by it; 0: none.",
        ),
        click.option("--preview-prompt", help="What those clips show; the first --prompt if not."),
        click.option(
            "--recompute",
            is_flag=True,
            help="Compute cheap results twice instead of keeping them, for less memory.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option(
            "--model",
            default="sprites",
            show_default=True,
            help="sprites (embedded), a diffusers folder, or a hub id.",
        ),
        click.option("--motion-adapter", help="AnimateDiff motion adapter for an image model."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
        click.option("--dtype", help="float32 (default), bfloat16 or float16."),
        click.option(
            "--weights",
            help="Type that the frozen model is held in: float32 (default), or that of --dtype "
            "for less memory.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@train.command("embedding")
@click.option(
    "--reference",
    required=True,
    type=click.Path(path_type=Path),
    help="Clip whose motion is learned.",
)
@click.option("--prompt", required=True, help="What it shows, its motion included.")
@click.option(
    "--sites",
    help="Comma-separated: PLACE:WIDTH such as up:1280 (places in, down, mid, up), or names of "
    "temporal blocks; down and up at the greatest width by default.",
)
@_motion_options
def train_embedding(reference: Path, prompt: str, sites: str | None, **said: Any) -> None:
    """Learn the motion of a clip as a motion embedding."""
    from kinetiq import motion_training

    own: dict[str, Any] = {} if sites is None else {"sites": _parse_sites(sites)}
    options = motion_training.EmbeddingOptions(**own, **_given(said))

    def learn(engine: Any, clips: "list[Clip]", **settings: Any) -> Any:
        return motion_training.train_embedding(
            engine, clips[0], prompt, said["out"], options, **settings
        )

    _learn_motion([reference], [prompt], learn, options, said)


@train.command("lora")
@click.option(
    "--reference",
    "references",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Clip whose motion is learned; may come again, for the same motion.",
)
@click.option(
    "--prompt",
    "prompts",
    required=True,
    multiple=True,
    help="What it shows, its motion included; one for all, or one for each --reference.",
)
@click.option("--target", help="k (default), k_out, q, v, ff or all.")
@click.option("--rank", type=int, help="Of the LoRA.")
@click.option(
    "--highway",
    help="all or released: let skip connections bypass its changes in training; none by default. "
    "To be said again to generate.",
)
@click.option("--beta", type=float, help="Strength of the --highway; 1.1 by default.")
@_motion_options
def train_lora(
    references: tuple[Path, ...],
    prompts: tuple[str, ...],
    target: str | None,
    rank: int | None,
    highway: str | None,
    beta: float | None,
    **said: Any,
) -> None:
    """Learn the motion that clips share as a motion LoRA."""
    from kinetiq import motion_training

    if len(prompts) not in (1, len(references)):
        raise RequestError(
            "train: --prompt must come once, or once for each of "
            f"{len(references)} --reference, got {len(prompts)}"
        )
    shown = prompts * len(references) if len(prompts) == 1 else prompts
    own = {"target": target, "rank": rank, "highway": highway, "beta": beta}
    options = motion_training.LoraOptions(**_given({**own, **said}))

    def learn(engine: Any, clips: "list[Clip]", **settings: Any) -> Any:
        return motion_training.train_lora(engine, clips, shown, said["out"], options, **settings)

    _learn_motion(list(references), list(shown), learn, options, said)


def _given(said: Mapping[str, Any]) -> dict[str, Any]:
    """What was said of a motion's training; what was left out has its default there."""
    model = ("model", "motion_adapter", "device", "weights")
    elsewhere = ("out", "folder", "fit", "as_json", *model)
    return {
        name: value
        for name, value in said.items()
        if name not in elsewhere and value is not None and value is not False
    }


def _learn_motion(
    references: list[Path],
    prompts: list[str],
    learn: Any,
    options: Any,
    said: Mapping[str, Any],
) -> None:
    """Load, read, train, and say what was made.

    Raises:
        InputError: something that was given cannot be used; before a model loads if that tells it.
    """
    import attrs

    from kinetiq.clip import Clip, peek
    from kinetiq.engine import Engine
    from kinetiq.files import check_target
    from kinetiq.progress import progress_bars, say_above_bar
    from kinetiq.request import Request

    for prompt in prompts:
        Request.from_options(prompt, {"frames": options.frames})
    out: Path = said["out"]
    if out.suffix != ".safetensors":
        raise RequestError(f"train: --out must end in .safetensors, got {str(out)!r}")
    check_target(out, "train")
    for path in references:
        seen = peek(path, options.frames or 2)
        if seen.num_frames < (options.frames or 2):
            raise ClipError(
                f"train: {path} must have at least {options.frames or 2} frames, the motion's, "
                f"got {seen.num_frames}; give a longer clip"
                + ("" if seen.num_frames < 2 else f", or --frames {seen.num_frames}")
            )

    def report(line: Any) -> None:
        losses = {"loss": line.loss, "loss of single frames": line.spatial_loss}
        told = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
        say_above_bar(f"step {line.step}: {', '.join([*told, f'{line.seconds:.0f} s'])}")

    with progress_bars() as progress:
        progress("loading", 0, 1)
        with Engine.load(
            said["model"],
            motion_adapter=said["motion_adapter"],
            device=said["device"],
            dtype=said["weights"],
        ) as engine:
            size = {
                "height": options.height or engine.defaults.height,
                "width": options.width or engine.defaults.width,
            }
            clips = []
            for number, path in enumerate(references):
                progress("reading", number, len(references))
                clips.append(Clip.read(path, fit=said["fit"], **size))
            motion = learn(engine, clips, folder=said["folder"], report=report, progress=progress)
    if said["as_json"]:
        click.echo(json.dumps({"out": str(out), **attrs.asdict(motion.info)}))
        return
    click.echo(click.format_filename(out))


def _parse_sites(sites: str) -> tuple[tuple[str, int] | str, ...]:
    """PLACE:WIDTH as pairs, all else as names."""
    found: list[tuple[str, int] | str] = []
    for word in (word.strip() for word in sites.split(",")):
        place, colon, width = word.partition(":")
        if colon and not re.fullmatch("[0-9]{1,6}", width):
            raise RequestError(
                f"train: --sites must be PLACE:WIDTH such as up:1280, or names, got {word!r}"
            )
        found.append((place, int(width)) if colon else word)
    return tuple(found)


@main.group()
def analyze() -> None:
    """Look into a model."""


@analyze.command("temporal")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Clip that is noised and shown to the model; noise alone without.",
)
@click.option("--prompt", default="", help="What it shows, its motion included.")
@click.option(
    "--motion",
    "motions",
    multiple=True,
    metavar="[WEIGHT*]FILE",
    help="A motion embedding whose effect is measured; several are added up.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for temporal.png and temporal.json.",
)
@click.option(
    "--fit",
    type=click.Choice(("crop", "fit", "stretch")),
    help="How the reference is brought to the model's size; crop by default.",
)
@click.option("--frames", type=int, help="Frames; the model's by default.")
@click.option("--size", help="HEIGHTxWIDTH in pixels; the model's by default.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the noise."
)
@click.option("--json", "as_json", is_flag=True, help="Print what temporal.json says.")
@click.option(
    "--model",
    default="sprites",
    show_default=True,
    help="sprites (embedded), a diffusers folder, or a hub id.",
)
@click.option("--motion-adapter", help="AnimateDiff motion adapter for an image model.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--dtype", help="float32 (default), bfloat16 or float16.")
def analyze_temporal(
    reference: Path | None,
    prompt: str,
    motions: tuple[str, ...],
    out: Path | None,
    fit: str | None,
    frames: int | None,
    size: str | None,
    seed: int,
    as_json: bool,
    model: str,
    motion_adapter: str | None,
    device: str,
    dtype: str | None,
) -> None:
    """Say how far each temporal attention looks over frames, and which are worth training.

    With a motion, also how much it changes what they look at.
    """
    from kinetiq import temporal_analysis
    from kinetiq.clip import Clip, peek
    from kinetiq.engine import Engine
    from kinetiq.files import write_text
    from kinetiq.progress import progress_bars
    from kinetiq.request import Request

    height, width = _parse_size("analyze", size)
    wanted = {"frames": frames, "height": height, "width": width}
    Request.from_options(prompt or temporal_analysis.NO_PROMPT, wanted)
    if reference is None and fit is not None:
        raise RequestError("analyze: --fit needs --reference, got none")
    if reference is not None and peek(reference, 2).num_frames < 2:
        raise ClipError(
            f"analyze: {reference} must have at least 2 frames, got 1; give a clip that moves"
        )
    learned = _read_motions(motions)
    if "lora" in learned:
        raise RequestError(
            "analyze: --motion must be a motion embedding, got a motion LoRA, which has no "
            "embedding at its sites"
        )
    if out is not None:
        temporal_analysis.prepare_folder(out)
    with progress_bars() as progress:
        progress("loading", 0, 1)
        with Engine.load(
            model, motion_adapter=motion_adapter, device=device, dtype=dtype
        ) as engine:
            clip = None
            if reference is not None:
                progress("reading", 0, 1)
                clip = Clip.read(
                    reference,
                    height=height or engine.defaults.height,
                    width=width or engine.defaults.width,
                    fit=fit or "crop",
                )
            motion: Any = learned.get("embedding")
            found = temporal_analysis.analyze_temporal(
                engine, clip, prompt, motion, seed=seed, progress=progress, **wanted
            )
    said = json.dumps(temporal_analysis.as_json(found), indent=2)
    if out is not None:
        write_text(out / temporal_analysis.REPORT, said + "\n", "analyze")
        temporal_analysis.draw(found, out / temporal_analysis.PICTURE)
    if as_json:
        click.echo(said)
        return
    click.echo(temporal_analysis.describe(found))
    if out is not None:
        click.echo(f"temporal.png and temporal.json are in {click.format_filename(out)}")


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="New folder, SOURCE-safetensors by default; of a motion, a .safetensors file, which is "
    "replaced if it is there and named here.",
)
@click.option("--frames", type=int, help="Of a motion: frames that it was trained on.")
@click.option("--height", type=int, help="Of a motion: height that it was trained on, in pixels.")
@click.option("--width", type=int, help="Of a motion: width that it was trained on, in pixels.")
@click.option("--family", help="Of a motion: animatediff or unet3d.")
@click.option(
    "--base",
    help="Of a motion: the model that it was trained on, to check it against: a diffusers folder, "
    "sprites, or a family for its public models.",
)
@click.option(
    "--target",
    help="Of a list without names: the layers it is of; k, k_out, q, v, ff or all.",
)
@click.option(
    "--peft",
    "as_peft",
    is_flag=True,
    help="The other way: a motion LoRA of kinetiq in the layout that diffusers and PEFT read.",
)
def convert(
    source: Path,
    out: Path | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    family: str | None,
    base: str | None,
    target: str | None,
    as_peft: bool,
) -> None:
    """Copy a model folder or a public motion file as safetensors.

    Motions are those of MotionInversion (motion_embed.pt), MotionDirector and its descendants,
    AnimateDiff, diffusers and PEFT. Pickles are read as plain tensors: no code that one may hold
    is run.
    """
    from kinetiq.convert import convert_folder, default_target

    said: dict[str, Any] = {
        "frames": frames,
        "height": height,
        "width": width,
        "family": family,
        "base": base,
        "target": target,
    }
    given = [f"--{name}" for name, value in said.items() if value is not None]
    if as_peft:
        from kinetiq.motion_convert import default_motion_target, require_other
        from kinetiq.motion_lora import MotionLora

        if given:
            raise RequestError(f"convert: {given[0]} is said of a public file, got --peft")
        made = out or default_motion_target(source, as_peft=True)
        require_other(source, made)
        MotionLora.read(source).write_peft(made)
        click.echo(click.format_filename(made))
        return
    if source.is_file():
        from kinetiq.motion_convert import PublicMotion, convert_motion, default_motion_target

        made = out or default_motion_target(source)
        found = convert_motion(source, made, PublicMotion(**said))
        click.echo(f"converting {found}", err=True)
        click.echo(click.format_filename(made))
        return
    if given:
        raise RequestError(f"convert: {given[0]} is said of a motion's file, got {source}")
    made = out or default_target(source)
    convert_folder(source, made, lambda name: click.echo(f"converting {name}", err=True))
    click.echo(click.format_filename(made))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Say what is installed, and how to install the rest."""
    from kinetiq.doctor import examine, render

    findings = examine()
    click.echo(json.dumps(findings, indent=2) if as_json else render(findings))


def _build_controls(
    reference: "Clip | None",
    control: str | None,
    learned: "Mapping[str, LearnedMotion]",
    given: Mapping[str, Any],
) -> "list[Control]":
    """The controls that were asked for, with the switches `given` to them.

    A clip starts from one noise: that of the first learned motion that has any.

    Raises:
        RequestError: a switch belongs to no control that was asked for, or is out of range.
    """
    import attrs

    from kinetiq.motion_injection import MotionInjection
    from kinetiq.query_injection import QueryInjection

    if reference is None and control not in (None, "none"):
        raise RequestError(f"generate: --control {control} needs --reference, got none")
    chosen = control or ("none" if reference is None else "motion")
    kinds = {"none": (), "both": ("query", "motion")}.get(chosen, (chosen,))
    _require_takers(given, chosen, (*kinds, *learned))
    values = {name: value for name, value in given.items() if name != "region"}
    if "region" in given:
        values["region"] = _read_region(given["region"])
    if "sites" in given:
        names = tuple(name.strip() for name in given["sites"].split(","))
        values["sites"] = names[0] if names[0] in _SITE_WORDS and len(names) == 1 else names
    controls: list[Control] = []
    makers = {"motion": MotionInjection, "query": QueryInjection}
    for kind in kinds if reference is not None else ():
        taken = {name: value for name, value in values.items() if name in _SWITCHES[kind]}
        controls.append(makers[kind](reference, **taken))
    noise_is_brought = False
    for kind, motion in learned.items():
        taken = {
            name.removeprefix("motion_"): value
            for name, value in values.items()
            if name in _SWITCHES[kind]
        }
        if noise_is_brought:
            taken["noise_prior"] = 0.0
        noise_is_brought |= motion.noise is not None
        controls.append(attrs.evolve(motion, **taken))
    return controls


def _require_takers(given: Mapping[str, Any], chosen: str, kinds: tuple[str, ...]) -> None:
    """Raise unless each switch that is `given` is one of a control of these kinds."""
    for name in given:
        takers = [kind for kind, switches in _SWITCHES.items() if name in switches]
        if set(takers) & set(kinds):
            continue
        option = f"generate: --{name.replace('_', '-')} acts with"
        steered = [kind for kind in takers if kind in CONTROLS]
        if steered:
            raise RequestError(
                f"{option} a --reference and --control {', '.join(steered)} or both, "
                f"got --control {chosen}"
            )
        got = [kind for kind in kinds if kind not in CONTROLS]
        raise RequestError(
            f"{option} a --motion that is of kind {' or '.join(takers)}, "
            f"got {' and '.join(got) or 'no --motion'}"
        )


def _read_motions(asked: tuple[str, ...]) -> "dict[str, LearnedMotion]":
    """The sum of the learned motions of each kind, "embedding" or "lora".

    Raises:
        CheckpointError: a file is no motion.
        RequestError: two motions cannot be added up.
    """
    from kinetiq.motion_embedding import MotionEmbedding
    from kinetiq.motion_file import read_info
    from kinetiq.motion_lora import MotionLora

    total: dict[str, LearnedMotion] = {}
    for words in asked:
        found = re.fullmatch(rf"({_NUMBER})\s*\*\s*(.+)", words)
        weight, path = (1.0, words) if found is None else (float(found[1]), found[2])
        kind = read_info(path).kind
        motion: Any = (MotionLora if kind == "lora" else MotionEmbedding).read(path)
        before: Any = total.get(kind)
        if isinstance(before, MotionEmbedding):
            shape = before.info
            motion = motion.resample(frames=shape.frames)
            motion = motion.resize(height=shape.height, width=shape.width)
        motion = motion if weight == 1.0 else weight * motion
        total[kind] = motion if before is None else before + motion
    return total


def _read_region(path: Path) -> "np.ndarray":
    """How bright a picture is, 0 to 1: [height, width], or [frames, height, width] of a clip."""
    from kinetiq.clip import Clip

    clip = Clip.read(path)
    mask: np.ndarray = clip.frames.astype("float32").mean(axis=-1) / 255.0
    if not mask.any():
        raise RequestError(
            f"generate: --region must be white where the motion is wanted, and {path} is all black"
        )
    return mask[0] if clip.is_still_image else mask


def _parse_size(where: str, size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    found = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", size)
    if found is None:
        raise RequestError(f"{where}: --size must be HEIGHTxWIDTH such as 320x512, got {size!r}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main()
