"""The command line: `kinetiq demo | generate | shots | train | analyze | convert | ...`."""

import json
import re
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import kinetiq.kernels
from kinetiq.command_line import PlainGroup
from kinetiq.errors import CheckpointError, ClipError, RequestError
from kinetiq.options import (
    PATH,
    backend_options,
    beta_option,
    device_option,
    fit_option,
    fps_option,
    json_option,
    model_options,
    motion_training_options,
    motions_option,
    network_options,
    sampling_options,
    seed_option,
    size_options,
    source_options,
    until_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from kinetiq.clip import Clip
    from kinetiq.controls import Control, LearnedMotion
    from kinetiq.moft_guidance import MoftGuidance

# `python -m kinetiq` puts the working directory on the path; in a checkout our folder `kernels`
# would then answer for the package of that name that transformers and diffusers probe for. They
# are imported later, when they are used.
_OWN_KERNELS = Path(kinetiq.kernels.__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry, "kernels").resolve() != _OWN_KERNELS]

CONTROLS = ("motion", "query", "both", "none")
_SHARED = ("until", "halves", "region")
_LEARNED = ("until", "halves", "motion_scale", "noise_prior")
_GUIDING = ("moft_weight", "moft_step_size", "moft_window", "moft_tap")
_SWITCHES = {  # of each kind of control: the options that it takes
    "motion": (*_SHARED, "parts"),
    "query": (*_SHARED, "sites", "reduce_leak"),
    "embedding": (*_LEARNED, "value_scale", "debias"),
    "lora": (*_LEARNED, "highway", "beta"),
    "guidance": ("region", "speed", *_GUIDING),
}
_SITE_WORDS = ("spatial", "temporal", "both")
_DIRECTIONS = ("left", "right", "up", "down")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


class MainGroup(PlainGroup):
    """The command line as a whole."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """The commands in the order in which a new user wants them."""
        return [*self.commands, "export", "bench"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command; exports and benches are imported only when they are asked for."""
        if cmd_name == "bench":
            from kinetiq.bench.command import bench

            return bench
        if cmd_name == "export":
            from kinetiq.export.command import export

            return export
        return super().get_command(ctx, cmd_name)


@click.group("kinetiq", cls=MainGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kinetiq")
def main() -> None:
    """Generate video whose motion is chosen by a reference clip and whose content by a prompt."""


@main.command()
@click.option(
    "--out",
    type=PATH,
    default=Path("kinetiq-demo"),
    show_default=True,
    help="Folder for the clips, the sheet and report.json.",
)
@sampling_options
@until_option
@size_options("Frames of each clip.", "HEIGHTxWIDTH in pixels, a square such as 48x48.")
@fps_option
@json_option("Print what report.json says.")
@backend_options
@network_options
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
    device: str | None,
    dtype: str | None,
    backend: str,
    network: Path | None,
    trust: tuple[str, ...],
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
        with Engine.load(
            "sprites", device=device, dtype=dtype, backend=backend, network=network, trust=trust
        ) as engine:
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
    type=PATH,
    help="Clip whose motion is wanted: a video, a gif, a webp or a folder of images.",
)
@click.option(
    "--out",
    required=True,
    type=PATH,
    help=".mp4, .webm, .gif, .webp, or no suffix for a folder of images.",
)
@click.option(
    "--control",
    type=click.Choice(CONTROLS),
    help="motion (default with a reference): motion injection; query: query injection, "
    "the paper's; both; none (default without).",
)
@until_option
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
    "--moft",
    type=PATH,
    help="Clip whose motion gradients on the latents follow, step by step (MOFT guidance).",
)
@click.option(
    "--direction",
    type=click.Choice(_DIRECTIONS),
    help="Where gradients move everything, without a clip.",
)
@click.option(
    "--speed",
    type=float,
    help="Factor on the motion of a direction; 1 by default, 0 for stillness.",
)
@click.option(
    "--drag",
    "drags",
    multiple=True,
    metavar="X,Y:X,Y",
    help="Gradients move what is at the first point to the second, in pixels from the top left; "
    "as often as wanted.",
)
@click.option(
    "--region",
    "regions",
    multiple=True,
    metavar="MASK[:MOTION]",
    help="Image, or for a --reference clip of as many frames, white where the motion is wanted. "
    "With a motion of its own, a direction or a clip (mask.png:right), gradients move that "
    "region; as often as wanted. For gradients a mask should hug the shape and the path that it "
    "is to take.",
)
@click.option("--moft-weight", type=float, help="How hard gradients pull; 10 by default.")
@click.option("--moft-step-size", type=float, help="Of gradients; 0.5 by default.")
@click.option(
    "--moft-window",
    metavar="A,B[,C]",
    help="Shares of the steps between which gradients act, such as 0.12,0.48 (default). Of a "
    "--drag three shares of the steps that remain: motion acts down to B, and that points look "
    "the same from A to C; 0.76,0.72,0.2 by default.",
)
@click.option(
    "--moft-tap",
    metavar="PATH",
    help="Block or temporal attention whose output gradients compare; up_blocks.1 by default.",
)
@fit_option("How clips to move like are brought to the clip's size; crop by default.")
@motions_option(
    "A motion that was learned before, such as dance.safetensors or -0.5*dance.safetensors; "
    "several of a kind are added up, at the frames and the size of the first. Of an embedding and "
    "a LoRA, the first that has noise brings it, and the other's --noise-prior is 0."
)
@click.option(
    "--motion-scale",
    type=float,
    help="Factor on what --motion adds; 1 by default. Below 0 an embedding's motion is reversed; "
    "of a LoRA it is arithmetic on weights alone.",
)
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
    help="Share of the learned reference's own noise at the start, 0 to 1; by default what the "
    "motion's file says, else 0.5 for a motion embedding, 0.2 for a LoRA, of what noise there is.",
)
@click.option(
    "--highway",
    type=click.Choice(("all", "released", "none")),
    help="Let skip connections bypass a LoRA's changes; as it was trained by default.",
)
@beta_option
@click.option("--negative-prompt", default="", help="What the clip does not show.")
@sampling_options
@click.option("--sampler", help="ddim, ddpm, euler, dpm++2m or lcm.")
@click.option("--eta", type=float, default=0.0, show_default=True, help="Noise of DDIM.")
@size_options("Frames of the clip.", "HEIGHTxWIDTH in pixels.")
@fps_option
@click.option(
    "--scale",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Enlarge what is written by a whole number.",
)
@json_option("Print what was made as one JSON object.")
@source_options
@backend_options
@network_options
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
    moft: Path | None,
    direction: str | None,
    speed: float | None,
    drags: tuple[str, ...],
    regions: tuple[str, ...],
    moft_weight: float | None,
    moft_step_size: float | None,
    moft_window: str | None,
    moft_tap: str | None,
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
    device: str | None,
    dtype: str | None,
    backend: str,
    network: Path | None,
    trust: tuple[str, ...],
) -> None:
    """Generate one clip that moves as it is told to."""
    from kinetiq.clip import Clip, check_write, peek
    from kinetiq.engine import Engine
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
    region, moving = _parse_regions(regions)
    clips = [path for path in (reference, moft, *moving.values()) if isinstance(path, Path)]
    if not clips and fit is not None:
        raise RequestError("generate: --fit needs --reference, got none, and no --moft either")
    # The whole reference is read once the size is known that it is needed at, which the model says.
    start = None if reference is None else peek(reference)
    switches = {
        "until": until,
        "sites": sites,
        "reduce_leak": reduce_leak,
        "parts": parts,
        "halves": halves,
        "region": region,
        "speed": speed,
        "moft_weight": moft_weight,
        "moft_step_size": moft_step_size,
        "moft_window": None if moft_window is None else _parse_window(moft_window, bool(drags)),
        "moft_tap": moft_tap,
        "motion_scale": motion_scale,
        "value_scale": value_scale,
        "debias": debias,
        "noise_prior": noise_prior,
        "highway": highway,
        "beta": beta,
    }
    given: dict[str, Any] = {n: value for n, value in switches.items() if value is not None}
    if highway == "none":
        given["highway"] = None
    learned = _read_motions(motions, given)
    asked = {
        "reference": None if moft is None else peek(moft),
        "direction": direction,
        "regions": moving,
        "points": [_parse_drag(drag) for drag in drags],
    }
    controls = _build_controls(start, control, learned, asked, given)
    with progress_bars() as progress:
        progress("loading", 0, 1)
        with Engine.load(
            model,
            motion_adapter=motion_adapter,
            device=device,
            dtype=dtype,
            backend=backend,
            network=network,
            trust=trust,
        ) as engine:
            defaults = engine.defaults
            check_write(out, frames=frames or defaults.frames, fps=fps or defaults.fps)

            def read(path: Path) -> Clip:
                return Clip.read(
                    path,
                    height=height or defaults.height,
                    width=width or defaults.width,
                    fit=fit or "crop",
                )

            if clips and controls:
                progress("reading", 0, 1)
                controls = [
                    _with_whole_clips(control, reference, moft, moving, read)
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


@main.command()
@click.argument("storyboard", type=PATH)
@click.option("--out", required=True, type=PATH, help="Folder for the shots and sheet.png.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="In place of the storyboard's.")
@click.option("--plain", is_flag=True, help="Write the same shots left alone too, to compare.")
@click.option(
    "--save-masks", is_flag=True, help="Write where the subject was found, an image a frame."
)
@click.option("--overwrite", is_flag=True, help="Make all of it again, not only what is missing.")
@click.option(
    "--scale",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Enlarge what is written by a whole number.",
)
@json_option("Print what was made as one JSON object.")
@source_options
@backend_options
def shots(
    storyboard: Path,
    out: Path,
    seed: int | None,
    plain: bool,
    save_masks: bool,
    overwrite: bool,
    scale: int,
    as_json: bool,
    model: str,
    motion_adapter: str | None,
    device: str | None,
    dtype: str | None,
    backend: str,
) -> None:
    """Generate several shots of one subject from a YAML file.

    \b
    subject: ring
    shots:
      - prompt: a ring moving left on a dark blue background
      - prompt: a ring on a dark red background
        reference: zigzag.mp4
      - prompt: a ring on a dark green background
        motion: dance.safetensors

    What is there of a run that was stopped is not made again.
    """  # noqa: D301  click's mark that lines stay as they are
    from kinetiq.backends import usual_device
    from kinetiq.board_folder import BoardOptions, make_board
    from kinetiq.engine import Engine, require_eager_for_shots
    from kinetiq.progress import progress_bars
    from kinetiq.storyboard import Storyboard

    require_eager_for_shots(backend)  # before a model is loaded, or exported, in vain
    options = BoardOptions(
        plain=plain, masks=save_masks, overwrite=overwrite, scale=scale, seed=seed
    )
    placing: dict[str, Any] = {
        "motion_adapter": motion_adapter,
        "device": device or usual_device(backend),  # which says what board it is
        "dtype": dtype,
        "backend": backend,
    }
    read = Storyboard.read(storyboard)
    with progress_bars() as progress:

        def load() -> Engine:
            progress("loading", 0, 1)
            return Engine.load(model, **placing)

        made = make_board(
            read, out, load, options, model={"model": model, **placing}, progress=progress
        )
    if as_json:
        click.echo(json.dumps({"out": str(out), **made}))
        return
    for shot in made["shots"]:
        click.echo(f"{click.format_filename(out / shot['file'])}: {shot['prompt']}")
    if made["made"]:
        click.echo(f"{click.format_filename(out / made['sheet'])} shows them")
    else:
        click.echo("All of it was there; --overwrite makes it again")


@main.group()
def train() -> None:
    """Train a model."""


@train.command("sprites")
@click.option(
    "--out",
    required=True,
    type=PATH,
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
@seed_option()
@click.option("--threads", type=click.IntRange(1), help="CPU threads; PyTorch's own by default.")
@click.option(
    "--start-from",
    type=PATH,
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
@device_option
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


@train.command("embedding")
@click.option(
    "--reference",
    required=True,
    type=PATH,
    help="Clip whose motion is learned.",
)
@click.option("--prompt", required=True, help="What it shows, its motion included.")
@click.option(
    "--sites",
    help="Comma-separated: PLACE:WIDTH such as up:1280 (places in, down, mid, up), or names of "
    "temporal blocks; down and up at the greatest width by default.",
)
@motion_training_options
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
    type=PATH,
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
@click.option("--rank", type=int, help="Of the LoRA; 32 by default.")
@click.option(
    "--highway",
    help="all or released: let skip connections bypass its changes in training; none by default. "
    "The file says it to generate.",
)
@beta_option
@motion_training_options
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
        if len(references) > 1:
            say_above_bar(
                f"{len(references)} references: no noise is kept, since it would be that of one"
            )
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


@main.command()
@motions_option(
    "A learned motion, such as dance.safetensors, 0.5*dance.safetensors or -zoom.safetensors; "
    "several, of one kind, are added up, at the frames and the size of the first.",
    required=True,
)
@click.option(
    "--frames", type=int, help="Bring the frames of an embedding to this number; a LoRA has none."
)
@click.option("--out", required=True, type=PATH, help="The new motion's .safetensors file.")
@json_option("Print what the file says of itself as one JSON object.")
def motion(motions: tuple[str, ...], frames: int | None, out: Path, as_json: bool) -> None:
    """Scale, reverse, add or resample learned motions.

    What comes of it is a motion's file. Of a reference's noise, that of the terms with a positive
    weight is kept.
    """
    import attrs

    from kinetiq.files import check_target
    from kinetiq.motion_embedding import MotionEmbedding

    if out.suffix != ".safetensors":
        raise RequestError(f"motion: --out must end in .safetensors, got {str(out)!r}")
    check_target(out, "motion")
    learned = _read_motions(motions, {})
    if len(learned) > 1:
        raise RequestError("motion: all --motion must be of one kind, got an embedding and a LoRA")
    (made,) = learned.values()
    if frames is not None:
        if not isinstance(made, MotionEmbedding):
            raise RequestError(
                "motion: --frames acts on a motion embedding, got a motion LoRA, which fits any "
                "number of frames"
            )
        made = made.resample(frames=frames)
    made.write(out)
    if as_json:
        click.echo(json.dumps({"out": str(out), **attrs.asdict(made.info)}))
        return
    click.echo(click.format_filename(out))


@main.group()
def analyze() -> None:
    """Look into a model."""


@analyze.command("temporal")
@click.option(
    "--reference",
    type=PATH,
    help="Clip that is noised and shown to the model; noise alone without.",
)
@click.option("--prompt", default="", help="What it shows, its motion included.")
@motions_option("A motion embedding whose effect is measured; several are added up.")
@click.option(
    "--out",
    type=PATH,
    help="Folder for temporal.png and temporal.json.",
)
@fit_option("How the reference is brought to the model's size; crop by default.")
@size_options("Frames; the model's by default.", "HEIGHTxWIDTH in pixels; the model's by default.")
@seed_option("Of the noise.")
@json_option("Print what temporal.json says.")
@model_options
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
    from kinetiq.drawing import prepare_folder
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
    learned = _read_motions(motions, {})
    if "lora" in learned:
        raise RequestError(
            "analyze: --motion must be a motion embedding, got a motion LoRA, which has no "
            "embedding at its sites"
        )
    if out is not None:
        prepare_folder(out, (temporal_analysis.PICTURE, temporal_analysis.REPORT))
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


@analyze.command("moft")
@click.option("--reference", type=PATH, help="Clip whose motion is looked at.")
@click.option(
    "--region",
    "regions",
    type=PATH,
    multiple=True,
    help="Image, or clip of as many frames, white where curves are wanted: it should hug what "
    "moves and its path; several times for several regions, the middle of the frame without.",
)
@click.option("--tap", help="Block or temporal attention that is read; up_blocks.1 by default.")
@click.option("--share", type=float, help="Of the channels that are kept; 0.04 by default.")
@click.option("--out", type=PATH, help="Folder for moft.png and moft.json.")
@fit_option("How the reference is brought to the model's size; crop by default.")
@size_options("Frames; the model's by default.", "HEIGHTxWIDTH in pixels; the model's by default.")
@click.option(
    "--calibrate",
    is_flag=True,
    help="Find the motion channels of the model again, and keep them instead of those it has.",
)
@click.option(
    "--pictures",
    type=PATH,
    help="Image or folder of images that are panned to calibrate; drawn ones without.",
)
@json_option("Print what moft.json says, or without a reference the motion channels.")
@model_options
def analyze_moft(
    reference: Path | None,
    regions: tuple[Path, ...],
    tap: str | None,
    share: float | None,
    out: Path | None,
    fit: str | None,
    frames: int | None,
    size: str | None,
    calibrate: bool,
    pictures: Path | None,
    as_json: bool,
    model: str,
    motion_adapter: str | None,
    device: str,
    dtype: str | None,
) -> None:
    """Show what a model knows of a clip's motion, and by which channels it knows it."""
    from kinetiq import moft, moft_analysis
    from kinetiq.clip import Clip, peek
    from kinetiq.drawing import prepare_folder
    from kinetiq.engine import Engine
    from kinetiq.files import write_text
    from kinetiq.progress import progress_bars
    from kinetiq.request import Request

    height, width = _parse_size("analyze", size)
    wanted = {"frames": frames, "height": height, "width": width}
    Request.from_options(moft_analysis.ANY_PROMPT, wanted)
    if reference is None and not calibrate:
        raise RequestError("analyze: moft needs --reference or --calibrate, got neither")
    if pictures is not None and not calibrate:
        raise RequestError("analyze: --pictures needs --calibrate, got none")
    of_reference = {
        "--region": regions or None,
        "--share": share,
        "--out": out,
        "--fit": fit,
        "--frames": frames,
        "--size": size,
    }
    for name, value in of_reference.items():
        if reference is None and value is not None:
            raise RequestError(f"analyze: {name} needs --reference, got none")
    if reference is not None and peek(reference, 2).num_frames < 2:
        raise ClipError(
            f"analyze: {reference} must have at least 2 frames, got 1; give a clip that moves"
        )
    masks = {str(path): _read_region(path, "analyze") for path in regions}
    stills = None
    if pictures is not None:
        stills = [Clip.from_array(picture[None]) for picture in Clip.read(pictures).frames]
    if out is not None:
        prepare_folder(out, (moft_analysis.PICTURE, moft_analysis.REPORT))
    found = None
    with progress_bars() as progress:
        progress("loading", 0, 1)
        with Engine.load(
            model, motion_adapter=motion_adapter, device=device, dtype=dtype
        ) as engine:
            if calibrate:
                channels = moft.store_channels(
                    engine.checkpoint, engine.denoiser, tap, pictures=stills, progress=progress
                )
            if reference is not None:
                progress("reading", 0, 1)
                clip = Clip.read(
                    reference,
                    height=height or engine.defaults.height,
                    width=width or engine.defaults.width,
                    fit=fit or "crop",
                )
                found = moft_analysis.analyze_moft(
                    engine,
                    clip,
                    masks,
                    tap=tap,
                    share=moft.SHARE if share is None else share,
                    frames=frames,
                    height=height,
                    width=width,
                    progress=progress,
                )
    if found is None:
        said = moft_analysis.channels_json(channels, moft.SHARE)
        words = moft_analysis.describe_channels(channels, moft.SHARE)
    else:
        said, words = moft_analysis.as_json(found), moft_analysis.describe(found)
    text = json.dumps(said, indent=2, allow_nan=False)
    if found is not None and out is not None:
        write_text(out / moft_analysis.REPORT, text + "\n", "analyze")
        moft_analysis.draw(found, out / moft_analysis.PICTURE)
        words += f"\nmoft.png and moft.json are in {click.format_filename(out)}"
    click.echo(text if as_json else words)


@main.command()
@click.argument("source", type=PATH)
@click.option(
    "--out",
    type=PATH,
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
@json_option()
def doctor(as_json: bool) -> None:
    """Say what is installed, and how to install the rest."""
    from kinetiq.doctor import examine, render

    findings = examine()
    click.echo(json.dumps(findings, indent=2) if as_json else render(findings))


def _build_controls(
    reference: "Clip | None",
    control: str | None,
    learned: "Mapping[str, LearnedMotion]",
    guided: Mapping[str, Any],
    given: Mapping[str, Any],
) -> "list[Control]":
    """The controls that were asked for, with the switches `given` to them.

    What `guided` holds says what motion gradients are to follow; its regions are what
    `_parse_regions` made. A clip starts from one noise: that of the first learned motion that has
    any, and a share that is `given` is of that.

    Raises:
        RequestError: a switch belongs to no control that was asked for, or is out of range.
    """
    from kinetiq.learned_motion import use_with
    from kinetiq.motion_injection import MotionInjection
    from kinetiq.query_injection import QueryInjection

    if reference is None and control not in (None, "none"):
        raise RequestError(f"generate: --control {control} needs --reference, got none")
    chosen = control or ("none" if reference is None else "motion")
    kinds = {"none": (), "both": ("query", "motion")}.get(chosen, (chosen,))
    guiding = ("guidance",) if any(guided.values()) else ()
    _require_takers(given, chosen, (*kinds, *learned, *guiding))
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
        if motion.noise is None and any(one.noise is not None for one in learned.values()):
            taken.pop("noise_prior", None)  # it is the other's
        elif noise_is_brought:
            taken["noise_prior"] = 0.0
        noise_is_brought |= motion.noise is not None
        controls.append(use_with(motion, **taken))
    if guiding:
        taken = {
            name.removeprefix("moft_"): value
            for name, value in values.items()
            if name in _SWITCHES["guidance"]
        }
        if guided["points"] and "window" in taken:
            taken["drag_window"] = taken.pop("window")
        if guided["regions"] and controls:
            taken.pop("region", None)  # it is theirs: each region of a guidance has its own
        controls.append(_build_guidance(guided, taken))
    return controls


def _build_guidance(guided: Mapping[str, Any], taken: Mapping[str, Any]) -> "MoftGuidance":
    from kinetiq.clip import peek
    from kinetiq.moft_guidance import MoftGuidance, MoftRegion

    moving: Mapping[Path, Path | str] = guided["regions"]
    if not moving:
        return MoftGuidance(**{**guided, "regions": ()}, **taken)
    taken = dict(taken)
    speed = {"speed": taken.pop("speed")} if "speed" in taken else {}
    if speed and not any(isinstance(motion, str) for motion in moving.values()):
        raise RequestError("generate: --speed acts with a direction, and each --region has a clip")
    regions = [
        MoftRegion(_read_region(mask), reference=peek(motion))
        if isinstance(motion, Path)
        else MoftRegion(_read_region(mask), direction=motion, **speed)
        for mask, motion in moving.items()
    ]
    return MoftGuidance(**{**guided, "regions": regions}, **taken)


def _with_whole_clips(
    control: "Control",
    reference: Path | None,
    moft: Path | None,
    moving: "Mapping[Path, Path | str]",
    read: "Callable[[Path], Clip]",
) -> "Control":
    """A control that was made with the first frames of its clips, with all of them."""
    import attrs

    from kinetiq.injection import Injection
    from kinetiq.moft_guidance import MoftGuidance

    if isinstance(control, Injection) and reference is not None:
        return attrs.evolve(control, reference=read(reference))
    if not isinstance(control, MoftGuidance):
        return control
    regions = [
        attrs.evolve(region, reference=read(motion)) if isinstance(motion, Path) else region
        for region, motion in zip(control.regions, moving.values(), strict=True)
    ]
    whole = None if moft is None else read(moft)
    return attrs.evolve(control, reference=whole, regions=regions)


def _require_takers(given: Mapping[str, Any], chosen: str, kinds: tuple[str, ...]) -> None:
    """Raise unless each switch that is `given` is one of a control of these kinds."""
    for name in given:
        takers = [kind for kind, switches in _SWITCHES.items() if name in switches]
        if set(takers) & set(kinds):
            continue
        option = f"generate: --{name.replace('_', '-')} acts with"
        if takers == ["guidance"]:
            guides = "--moft, --direction, --drag or --region MASK:MOTION"
            if name == "speed":
                guides = "--direction or --region MASK:DIRECTION"
            raise RequestError(f"{option} {guides}, got none of them")
        steered = [kind for kind in takers if kind in CONTROLS]
        if steered:
            raise RequestError(
                f"{option} a --reference and --control {', '.join(steered)} or both, "
                f"got --control {chosen}"
                + ("; or with --moft, --direction or --drag" if "guidance" in takers else "")
            )
        got = [kind for kind in kinds if kind in ("embedding", "lora")]
        raise RequestError(
            f"{option} a --motion that is of kind {' or '.join(takers)}, "
            f"got {' and '.join(got) or 'no --motion'}"
        )


def _read_motions(asked: tuple[str, ...], given: Mapping[str, Any]) -> "dict[str, LearnedMotion]":
    """The sum of the learned motions of each kind, "embedding" or "lora".

    Switches that are `given` are for the sum, so what files say of them does not count, and need
    not be the same in all.

    Raises:
        CheckpointError: a file is no motion.
        RequestError: two motions cannot be added up.
    """
    from kinetiq.learned_motion import default_switches, use_with
    from kinetiq.motion_embedding import MotionEmbedding
    from kinetiq.motion_file import read_info
    from kinetiq.motion_lora import MotionLora

    total: dict[str, LearnedMotion] = {}
    for words in asked:
        weight, path = _parse_weight(words)
        kind = read_info(path).kind
        made: Any = MotionLora if kind == "lora" else MotionEmbedding
        names = [name.removeprefix("motion_") for name in given if name in _SWITCHES[kind]]
        defaults = default_switches(made)
        motion: Any = use_with(made.read(path), **{name: defaults[name] for name in names})
        before: Any = total.get(kind)
        if isinstance(before, MotionEmbedding):
            shape = before.info
            motion = motion.resample(frames=shape.frames)
            motion = motion.resize(height=shape.height, width=shape.width)
        motion = motion if weight == 1.0 else weight * motion
        total[kind] = motion if before is None else before + motion
    return total


def _parse_weight(words: str) -> tuple[float, str]:
    """The weight and the file of [WEIGHT*]FILE; a minus before a name that is no file is -1."""
    found = re.fullmatch(rf"({_NUMBER})\s*\*\s*(.+)", words)
    if found is not None:
        return float(found[1]), found[2]
    if words.startswith("-") and not _exists(words):
        return -1.0, words[1:].strip()
    return 1.0, words


def _parse_regions(asked: tuple[str, ...]) -> "tuple[Path | None, dict[Path, Path | str]]":
    """The mask that comes without a motion, and of each other its clip or its direction.

    Raises:
        RequestError: a motion is neither, a mask comes twice, or two come without a motion.
    """
    plain: Path | None = None
    moving: dict[Path, Path | str] = {}
    for words in asked:
        start, colon, motion = words.rpartition(":")
        if not colon or _exists(words):
            if plain is not None:
                raise RequestError(
                    f"generate: --region without a motion must come at most once, got {plain} and "
                    f"{words}; each further one needs its own, such as {words}:right"
                )
            plain = Path(words)
        elif not start or not (motion in _DIRECTIONS or _exists(motion)):
            raise RequestError(
                "generate: --region must be MASK, or MASK:MOTION with a motion that is a file or "
                f"one of {', '.join(_DIRECTIONS)}, got {words!r}"
            )
        elif Path(start) in moving:
            raise RequestError(f"generate: --region must name each mask once, got {start} twice")
        else:
            moving[Path(start)] = motion if motion in _DIRECTIONS else Path(motion)
    return plain, moving


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except OSError:  # no file can have this name
        return False


def _parse_drag(words: str) -> tuple[tuple[float, float], tuple[float, float]]:
    point = rf"({_NUMBER}),({_NUMBER})"
    found = re.fullmatch(f"{point}:{point}", words)
    if found is None:
        raise RequestError(f"generate: --drag must be X,Y:X,Y such as 20,30:40,30, got {words!r}")
    x0, y0, x1, y1 = map(float, found.groups())
    return (x0, y0), (x1, y1)


def _parse_window(words: str, drags: bool) -> tuple[float, ...]:
    count, form = (3, "A,B,C such as 0.76,0.72,0.2") if drags else (2, "A,B such as 0.12,0.48")
    shares = words.split(",")
    if len(shares) != count or not all(re.fullmatch(_NUMBER, share) for share in shares):
        of = "with --drag" if drags else "without --drag"
        raise RequestError(f"generate: --moft-window must be {form} {of}, got {words!r}")
    return tuple(map(float, shares))


def _read_region(path: Path, where: str = "generate") -> "np.ndarray":
    """How bright a picture is, 0 to 1: [height, width], or [frames, height, width] of a clip."""
    from kinetiq.clip import Clip

    clip = Clip.read(path)
    mask: np.ndarray = clip.frames.astype("float32").mean(axis=-1) / 255.0
    if not mask.any():
        raise RequestError(
            f"{where}: --region must be white where the motion is wanted, and {path} is all black"
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
