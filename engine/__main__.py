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
    clip_options,
    device_option,
    fit_option,
    fps_option,
    json_option,
    max_clips_option,
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
    from kinetiq.clip import Clip

# `python -m kinetiq` puts the working directory on the path; in a checkout our folder `kernels`
# would then answer for the package of that name that transformers and diffusers probe for. They
# are imported later, when they are used.
_OWN_KERNELS = Path(kinetiq.kernels.__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry, "kernels").resolve() != _OWN_KERNELS]

# Of the options of commands, those that say how a model is loaded.
_LOADING = ("motion_adapter", "device", "dtype", "backend", "network", "trust")


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
    from kinetiq.clip_options import parse_size
    from kinetiq.demo import DemoOptions, check_folder, describe, run_demo
    from kinetiq.engine import Engine
    from kinetiq.progress import progress_bars

    height, width = parse_size("demo", size)
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
@click.option(
    "--out",
    required=True,
    type=PATH,
    help=".mp4, .webm, .gif, .webp, or no suffix for a folder of images.",
)
@clip_options
@json_option("Print what was made as one JSON object.")
@source_options
@backend_options
@network_options
def generate(out: Path, as_json: bool, model: str, **said: Any) -> None:
    """Generate one clip that moves as it is told to."""
    from kinetiq.backend_choice import settle_backend
    from kinetiq.clip import check_write
    from kinetiq.clip_options import ClipOptions
    from kinetiq.engine import Engine
    from kinetiq.progress import progress_bars

    # All that can be wrong with the options is said before a model loads.
    loading = {name: said.pop(name) for name in _LOADING}
    asked = ClipOptions(**said)
    asked.request_options()
    check_write(out, frames=asked.frames, fps=asked.fps)
    plan = asked.plan()
    if plan.guided:
        loading["backend"] = settle_backend(loading["backend"], "guidance needs gradients")
    with progress_bars() as progress:
        progress("loading", 0, 1)
        with Engine.load(model, **loading) as engine:
            defaults = engine.defaults
            check_write(out, frames=asked.frames or defaults.frames, fps=asked.fps or defaults.fps)
            if plan.reads_clips:
                progress("reading", 0, 1)
            controls = plan.read_controls(defaults)
            made = engine.generate(asked.prompt, controls, progress=progress, **plan.options)
    made.write(out, scale=asked.scale)
    written = {
        "out": str(out),
        "frames": made.num_frames,
        "height": made.height * asked.scale,
        "width": made.width * asked.scale,
        "fps": made.fps,
        "seed": asked.seed,
    }
    if as_json:
        click.echo(json.dumps(written))
        return
    count = "1 frame" if made.num_frames == 1 else f"{made.num_frames} frames"
    click.echo(
        f"{click.format_filename(out)}: {count} of {written['height']}x{written['width']} "
        f"(height x width), {made.fps:g} a second"
    )


@main.command()
@click.argument("manifest", type=PATH)
@click.option("--out", required=True, type=PATH, help="Folder for the clips and the log.")
@max_clips_option
@click.option(
    "--part",
    default="1/1",
    metavar="K/N",
    help="Make lines K, K + N and so on, empty ones not counted, so that N runs share a manifest.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace clips in the log of the folder that are not what their line asks for; nothing "
    "else.",
)
@json_option("Print what was made as one JSON object.")
@source_options
@backend_options
@network_options
def batch(
    manifest: Path,
    out: Path,
    max_clips: int,
    part: str,
    overwrite: bool,
    as_json: bool,
    model: str,
    **loading: Any,
) -> int:
    """Generate a clip for each line of a file of JSON lines.

    \b
    {"prompt": "a red circle", "reference": "zigzag.mp4", "seed": 7}
    {"prompt": "a blue ring", "motion": ["dance.safetensors", "-0.5*zoom.safetensors"]}
    {"prompt": "a gold star", "direction": "left", "out": "stars/left.webm"}

    Keys are the options of `kinetiq generate`, with _ for -, and the file's name in the folder,
    clip_000001.mp4 and so on by default. A run that was stopped is continued: what is there is not
    made again. A line that fails does not keep others from it; batch_log.jsonl, with --part
    batch_log_KofN.jsonl, says what became of each.
    """  # noqa: D301  click's mark that lines stay as they are
    from kinetiq.batch_folder import BatchModel, BatchOptions, make_batch
    from kinetiq.batch_log import Part
    from kinetiq.engine import Engine
    from kinetiq.progress import progress_bars, say_above_bar

    options = BatchOptions(part=Part.parse(part), max_clips=max_clips, overwrite=overwrite)
    with progress_bars() as progress:

        def load() -> Engine:
            progress("loading", 0, 1)
            return Engine.load(model, **loading)

        made = make_batch(
            manifest,
            out,
            load,
            options,
            describe=lambda: BatchModel.describe(
                model, loading["motion_adapter"], loading["dtype"]
            ),
            report=lambda words: say_above_bar(f"kinetiq: failed: {words}"),
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(made))
    else:
        counts = (
            f"{len(made['made'])} made, {made['kept']} there before, {len(made['failed'])} failed"
        )
        click.echo(f"{click.format_filename(out)}: {counts}")
    return 1 if made["failed"] else 0


@main.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; others than this machine's own let anybody in who reaches it.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen at; 0: one that is free.",
)
@click.option("--files", type=PATH, help="Folder whose files requests may name; none without.")
@max_clips_option
@click.option(
    "--most-waiting",
    type=click.IntRange(1, 100_000),
    default=64,
    show_default=True,
    help="Requests that may wait for their turn; more are refused with 503.",
)
@click.option(
    "--most-pixels",
    type=click.IntRange(1),
    help="Of all frames of a clip, as memory allows; 4 times those of the model's own clips by "
    "default.",
)
@source_options
@backend_options
@network_options
def serve(
    host: str,
    port: int,
    files: Path | None,
    max_clips: int,
    most_waiting: int,
    most_pixels: int | None,
    model: str,
    **loading: Any,
) -> None:
    """Generate clips for whoever asks over HTTP.

    \b
    curl --json '{"prompt": "a red circle", "direction": "left"}' \\
        --output clip.mp4 http://127.0.0.1:8000/clips

    Keys are the options of `kinetiq generate`, with _ for -, and "format": "mp4" (default), "webm",
    "gif", "webp" or "png". Requests that come at the same time share a batch. What goes wrong is
    {"error": "..."} with status 400 (the request), 503 (too many), 500 (the work), or another of
    HTTP. GET /health says how many wait. An interrupt finishes what is under way.
    """  # noqa: D301  click's mark that lines stay as they are
    from kinetiq.engine import Engine
    from kinetiq.live_batch import LiveBatch
    from kinetiq.progress import progress_bars
    from kinetiq.server import ClipServer, ClipService, stopping_by_signal

    if files is not None and not files.is_dir():
        raise RequestError(f"serve: --files must be a folder, got {str(files)!r}")
    with progress_bars() as progress:
        progress("loading", 0, 1)
        engine = Engine.load(model, **loading)
    with engine, LiveBatch(engine, max_clips=max_clips, most_waiting=most_waiting) as batch:
        service = ClipService(batch, engine.defaults, model, files, most_pixels)
        with ClipServer(service, host, port) as server, stopping_by_signal(batch):
            click.echo(f"{model} at {server.address}: POST /clips, GET /health")
            server.serve_forever()


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
    from kinetiq.backend_choice import settle_backend
    from kinetiq.backends import usual_device
    from kinetiq.board_folder import BoardOptions, make_board
    from kinetiq.engine import Engine, require_eager_for_shots
    from kinetiq.progress import progress_bars
    from kinetiq.storyboard import Storyboard

    backend = settle_backend(backend, "shots look into the network")
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

    from kinetiq.clip_options import read_motions
    from kinetiq.files import check_target
    from kinetiq.motion_embedding import MotionEmbedding

    if out.suffix != ".safetensors":
        raise RequestError(f"motion: --out must end in .safetensors, got {str(out)!r}")
    check_target(out, "motion")
    learned = read_motions(motions)
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
    from kinetiq.clip_options import parse_size, read_motions
    from kinetiq.drawing import prepare_folder
    from kinetiq.engine import Engine
    from kinetiq.files import write_text
    from kinetiq.progress import progress_bars
    from kinetiq.request import Request

    height, width = parse_size("analyze", size)
    wanted = {"frames": frames, "height": height, "width": width}
    Request.from_options(prompt or temporal_analysis.NO_PROMPT, wanted)
    if reference is None and fit is not None:
        raise RequestError("analyze: --fit needs --reference, got none")
    if reference is not None and peek(reference, 2).num_frames < 2:
        raise ClipError(
            f"analyze: {reference} must have at least 2 frames, got 1; give a clip that moves"
        )
    learned = read_motions(motions)
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
    from kinetiq.clip_options import parse_size, read_region
    from kinetiq.drawing import prepare_folder
    from kinetiq.engine import Engine
    from kinetiq.files import write_text
    from kinetiq.progress import progress_bars
    from kinetiq.request import Request

    height, width = parse_size("analyze", size)
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
    masks = {str(path): read_region(path, "analyze") for path in regions}
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


if __name__ == "__main__":
    main()
