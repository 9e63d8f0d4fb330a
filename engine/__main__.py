"""The command line: `kinetiq demo | generate | train | convert | doctor | bench`."""

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
from kinetiq.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from kinetiq.clip import Clip
    from kinetiq.controls import Control

# `python -m kinetiq` puts the working directory on the path; in a checkout our folder `kernels`
# would then answer for the package of that name that transformers and diffusers probe for. They
# are imported later, when they are used.
_OWN_KERNELS = Path(kinetiq.kernels.__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry, "kernels").resolve() != _OWN_KERNELS]

CONTROLS = ("motion", "query", "both", "none")
_SHARED = ("until", "halves", "region")
_SWITCHES = {  # of each kind of control: the options that it takes
    "motion": (*_SHARED, "parts"),
    "query": (*_SHARED, "sites", "reduce_leak"),
}
_SITE_WORDS = ("spatial", "temporal", "both")

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
    """Generate one clip, moving like a reference if one is given."""
    import attrs

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
    }
    given = {name: value for name, value in switches.items() if value is not None}
    controls = _build_controls(start, control, given)
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
                controls = [attrs.evolve(control, reference=clip) for control in controls]
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
    help="Steps over which the paths that a word stands for widen from one to all.",
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


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="New folder for the converted model; SOURCE-safetensors by default.",
)
def convert(source: Path, out: Path | None) -> None:
    """Copy a model folder, its pickled weights as safetensors.

    They are read as plain tensors: no code that a pickle may hold is run.
    """
    from kinetiq.convert import convert_folder, default_target

    target = out or default_target(source)
    convert_folder(source, target, lambda name: click.echo(f"converting {name}", err=True))
    click.echo(click.format_filename(target))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Say what is installed, and how to install the rest."""
    from kinetiq.doctor import examine, render

    findings = examine()
    click.echo(json.dumps(findings, indent=2) if as_json else render(findings))


def _build_controls(
    reference: "Clip | None", control: str | None, given: Mapping[str, Any]
) -> "list[Control]":
    """The controls that were asked for, with the switches `given` to them.

    Raises:
        RequestError: a switch belongs to no control that was asked for, or is out of range.
    """
    from kinetiq.motion_injection import MotionInjection
    from kinetiq.query_injection import QueryInjection

    if reference is None and control not in (None, "none"):
        raise RequestError(f"generate: --control {control} needs --reference, got none")
    chosen = control or ("none" if reference is None else "motion")
    kinds = {"none": (), "both": ("query", "motion")}.get(chosen, (chosen,))
    for name in given:
        takers = [kind for kind, switches in _SWITCHES.items() if name in switches]
        if not set(takers) & set(kinds):
            raise RequestError(
                f"generate: --{name.replace('_', '-')} acts with a --reference and --control "
                f"{', '.join(takers)} or both, got --control {chosen}"
            )
    if reference is None:
        return []
    values = {name: value for name, value in given.items() if name != "region"}
    if "region" in given:
        values["region"] = _read_region(given["region"])
    if "sites" in given:
        names = tuple(name.strip() for name in given["sites"].split(","))
        values["sites"] = names[0] if names[0] in _SITE_WORDS and len(names) == 1 else names
    makers = {"motion": MotionInjection, "query": QueryInjection}
    return [
        makers[kind](reference, **{n: v for n, v in values.items() if n in _SWITCHES[kind]})
        for kind in kinds
    ]


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
