"""The command line: `kinetiq demo | generate | train | doctor | bench`.

Exit status 0: done; 1: the work failed; 2: bad input.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# `python -m kinetiq` puts the working directory on the path; in a checkout our folder `kernels`
# would then answer for the package of that name that transformers and diffusers probe for.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path.cwd()]

import click

from kinetiq.errors import InputError, KinetiqError, RequestError

CONTROLS = ("motion", "query", "both", "none")


class CommandGroup(click.Group):
    """A group that says our errors in one line, with their exit status."""

    def invoke(self, context: click.Context) -> Any:
        """As click does; our errors and warnings become one line each."""
        try:
            with _plain_warnings():
                return super().invoke(context)
        except KinetiqError as error:
            click.echo(f"kinetiq: error: {error}", err=True)
            context.exit(2 if isinstance(error, InputError) else 1)

    def list_commands(self, context: click.Context) -> list[str]:
        """The commands in the order in which a new user wants them."""
        return [*self.commands, "bench"]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command; the benches are imported only when they are asked for."""
        if name == "bench":
            from kinetiq.bench.command import bench

            return bench
        return super().get_command(context, name)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kinetiq")
def main() -> None:
    """Generate video whose motion is chosen by a reference clip and whose content by a prompt."""


def _model_options(function: Any) -> Any:
    options = [
        click.option(
            "--model",
            default="sprites",
            show_default=True,
            help="sprites (embedded), a diffusers folder, or a hub id.",
        ),
        click.option("--motion-adapter", help="AnimateDiff motion adapter for an image model."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
        click.option("--dtype", help="float32 (default), bfloat16 or float16."),
        click.option("--backend", default="eager", show_default=True),
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
@click.option("--json", "as_json", is_flag=True, help="Print report.json.")
@_model_options
def demo(
    out: Path,
    seed: int,
    steps: int | None,
    guidance: float | None,
    until: float | None,
    as_json: bool,
    model: str,
    motion_adapter: str | None,
    device: str,
    dtype: str | None,
    backend: str,
) -> None:
    """Move three subjects like one reference, side by side, and measure how well."""
    from kinetiq.demo import describe, run_demo
    from kinetiq.engine import Engine
    from kinetiq.progress import progress_bars

    if model != "sprites":
        raise RequestError(
            f"demo: model must be sprites, whose motion and content can be measured, got {model}; "
            "kinetiq generate takes any model"
        )
    with progress_bars() as progress:
        with Engine.load(
            model, motion_adapter=motion_adapter, device=device, dtype=dtype, backend=backend
        ) as engine:
            report = run_demo(
                engine,
                out,
                seed=seed,
                steps=steps,
                guidance_scale=guidance,
                until=until,
                progress=progress,
            )
    click.echo(json.dumps(report, indent=2) if as_json else describe(report))


@main.command()
@click.option("--prompt", required=True, help="What the clip shows.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Clip whose motion is wanted: mp4, webm, gif, webp or a folder of images.",
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
    default=None,
    help="motion (default with a reference): motion injection; query: query injection, "
    "the paper's; both; none.",
)
@click.option("--until", type=float, help="Share of the steps that are steered, 0 to 1.")
@click.option(
    "--sites", help="spatial, temporal, both, or names of sites, comma-separated (query injection)."
)
@click.option(
    "--reduce-leak",
    is_flag=True,
    help="Keep the clip's own mean of the queries over frames (query injection).",
)
@click.option(
    "--parts",
    default="qkv",
    show_default=True,
    help="Which of q, k and v are injected (motion injection).",
)
@click.option(
    "--halves",
    type=click.Choice(("both", "cond")),
    default="both",
    show_default=True,
    help="Which halves of guidance are steered.",
)
@click.option(
    "--region",
    type=click.Path(path_type=Path),
    help="Image, white where the reference's motion is wanted.",
)
@click.option(
    "--fit",
    type=click.Choice(("crop", "fit", "stretch")),
    default="crop",
    show_default=True,
    help="How the reference is brought to the clip's size.",
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
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
@_model_options
def generate(
    prompt: str,
    reference: Path | None,
    out: Path,
    control: str | None,
    until: float | None,
    sites: str | None,
    reduce_leak: bool,
    parts: str,
    halves: str,
    region: Path | None,
    fit: str,
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
    from kinetiq.clip import Clip, check_target
    from kinetiq.engine import Engine
    from kinetiq.progress import progress_bars
    from kinetiq.request import Request

    check_target(out)
    height, width = _parse_size(size)
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
    Request.from_options(prompt, options)  # what is wrong with it is said before a model loads
    clip = None if reference is None else Clip.read(reference)
    with progress_bars() as progress:
        with Engine.load(
            model, motion_adapter=motion_adapter, device=device, dtype=dtype, backend=backend
        ) as engine:
            if clip is not None:
                clip = clip.resize(
                    height or engine.defaults.height, width or engine.defaults.width, fit
                )
            controls = _build_controls(
                clip, control, until, sites, reduce_leak, parts, halves, region
            )
            made = engine.generate(prompt, controls, progress=progress, **options)
    made.write(out, scale=scale)
    said = {
        "out": str(out),
        "frames": made.num_frames,
        "height": made.height,
        "width": made.width,
        "fps": made.fps,
        "seed": seed,
    }
    click.echo(
        json.dumps(said)
        if as_json
        else f"{out}: {made.num_frames} frames of {made.width}x{made.height}, {made.fps:g} a second"
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
@click.option("--learning-rate", type=float, default=6e-4, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option(
    "--start-from",
    type=click.Path(path_type=Path),
    help="A finished checkpoint to start from; 'sprites' is the embedded one.",
)
@click.option("--save-every", type=click.IntRange(1), default=250, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
def train_sprites(
    out: Path,
    steps: int,
    decay_steps: int,
    vae_steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    threads: int | None,
    start_from: Path | None,
    save_every: int,
    device: str,
) -> None:
    """Train the embedded sprites model."""
    from kinetiq.checkpoint import embedded_folder
    from kinetiq.sprites import training

    options = training.TrainingOptions(
        steps=steps,
        decay_steps=decay_steps,
        vae_steps=vae_steps,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        save_every=save_every,
        device=device,
    )
    if start_from == Path("sprites"):
        start_from = embedded_folder()

    def report(line: training.TrainingStep) -> None:
        click.echo(
            f"{line.stage} {line.step}: loss {line.loss:.4f}, {line.seconds:.0f} s", err=True
        )

    with training.threads(threads):
        folder = training.train(out, options, start_from=start_from, report=report)
    click.echo(str(folder))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Say what is installed, what is missing, and the command that installs it."""
    from kinetiq.doctor import examine, render

    findings = examine()
    click.echo(json.dumps(findings, indent=2) if as_json else render(findings))


def _build_controls(
    reference: Any,
    control: str | None,
    until: float | None,
    sites: str | None,
    reduce_leak: bool,
    parts: str,
    halves: str,
    region: Path | None,
) -> list[Any]:
    from kinetiq.motion_injection import MotionInjection
    from kinetiq.query_injection import QueryInjection

    control = control or ("none" if reference is None else "motion")
    if control == "none":
        return []
    if reference is None:
        raise RequestError(f"generate: --control {control} needs --reference, got none")
    shared: dict[str, Any] = {"halves": halves}
    if until is not None:
        shared["until"] = until
    if region is not None:
        shared["region"] = _read_region(region)
    controls: list[Any] = []
    if control in ("query", "both"):
        chosen: Any = sites or "spatial"
        if chosen not in ("spatial", "temporal", "both"):
            chosen = tuple(name.strip() for name in chosen.split(","))
        controls.append(QueryInjection(reference, sites=chosen, reduce_leak=reduce_leak, **shared))
    elif sites is not None or reduce_leak:
        raise RequestError("generate: --sites and --reduce-leak belong to --control query or both")
    if control in ("motion", "both"):
        controls.append(MotionInjection(reference, parts=parts, **shared))
    return controls


def _read_region(path: Path) -> Any:
    from kinetiq.clip import Clip

    return Clip.read(path).frames[0].astype("float32").mean(axis=-1) / 255.0


def _parse_size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    parts = size.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise RequestError(f"size: must be HEIGHTxWIDTH such as 320x512, got {size!r}")
    return int(parts[0]), int(parts[1])


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Say our own warnings in one line; keep those of other packages to themselves."""
    from kinetiq.text import PromptWarning

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if issubclass(category, PromptWarning):
            click.echo(f"kinetiq: warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


if __name__ == "__main__":
    main()
