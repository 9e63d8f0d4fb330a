"""Options that several commands share, each said once: decorators, used as click's own are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

PATH = click.Path(path_type=Path)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def joined(*options: Callable[[Any], Any]) -> Callable[[_Function], _Function]:
    """One decorator for several, which help shows in this order."""

    def decorate(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


device_option = click.option(
    "--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."
)
_dtype_option = click.option("--dtype", help="float32 (default), bfloat16 or float16.")
source_options = joined(
    click.option(
        "--model",
        default="sprites",
        show_default=True,
        help="sprites (embedded), a diffusers folder, or a hub id.",
    ),
    click.option("--motion-adapter", help="AnimateDiff motion adapter for an image model."),
)
model_options = joined(source_options, device_option, _dtype_option)
# Of commands that let another back end run the network, in the place of `device_option`.
backend_options = joined(
    click.option(
        "--device",
        help="cpu, cuda or cuda:N; by default cpu, or cuda where the back end runs nowhere else.",
    ),
    _dtype_option,
    click.option(
        "--backend",
        default="eager",
        show_default=True,
        help="Runs the network; auto: the fastest that was recorded to be exact here.",
    ),
)
network_options = joined(
    click.option(
        "--network",
        type=PATH,
        help="What --backend runs: an export of the model, or an engine of TensorRT; made at "
        "first use by default.",
    ),
    click.option(
        "--trust",
        multiple=True,
        metavar="CHECKSUM",
        help="Of an engine that you vouch for, since an engine is code; can be repeated.",
    ),
)

# The request checks these, and says what is wrong with them as it does in Python.
sampling_options = joined(
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--steps", type=int, help="Sampler steps."),
    click.option("--guidance", type=float, help="Guidance scale; 1 is none."),
)
until_option = click.option(
    "--until", type=float, help="Share of the steps that are steered, 0 to 1."
)
beta_option = click.option("--beta", type=float, help="Strength of the --highway; 1.1 by default.")
fps_option = click.option("--fps", type=float, help="Frames a second.")


def size_options(frames: str, size: str) -> Callable[[_Function], _Function]:
    """`--frames` and `--size`, with what help says of each."""
    return joined(
        click.option("--frames", type=int, help=frames), click.option("--size", help=size)
    )


def fit_option(text: str, **settings: Any) -> Callable[[_Function], _Function]:
    """`--fit`, with what help says of it and further settings of click's."""
    return click.option(
        "--fit", type=click.Choice(("crop", "fit", "stretch")), help=text, **settings
    )


def seed_option(text: str | None = None) -> Callable[[_Function], _Function]:
    """`--seed` where no request checks it."""
    return click.option(
        "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help=text
    )


def motions_option(text: str, **settings: Any) -> Callable[[_Function], _Function]:
    """`--motion`, as often as wanted: the parameter is `motions`, each `[WEIGHT*]FILE`."""
    return click.option(
        "--motion", "motions", multiple=True, metavar="[WEIGHT*]FILE", help=text, **settings
    )


def json_option(text: str = "Print one JSON object.") -> Callable[[_Function], _Function]:
    """`--json`: the parameter is `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=text)


# Of `train embedding` and `train lora`; None is the default of the training.
motion_training_options = joined(
    click.option("--out", required=True, type=PATH, help="The motion's .safetensors file."),
    click.option(
        "--folder",
        type=PATH,
        help="Of the run, which is continued if it is there; OUT with the suffix .training "
        "by default.",
    ),
    click.option(
        "--steps",
        type=int,
        help="Optimiser steps; 350 by default for an embedding, 300 for a LoRA.",
    ),
    click.option(
        "--learning-rate",
        type=float,
        help="Of the motion; 0.02 by default for an embedding, 0.0005 for a LoRA.",
    ),
    click.option("--loss", help="hybrid (default), debiased, mse or vmc."),
    click.option("--frames", type=int, help="Frames of the motion; the model's by default."),
    click.option("--height", type=int, help="Pixels; the model's by default."),
    click.option("--width", type=int, help="Pixels; the model's by default."),
    fit_option("How a reference is brought to that size.", default="crop", show_default=True),
    click.option(
        "--dropout",
        type=float,
        help="Share of low-rank changes, a LoRA's and those of the hybrid loss, left out; 0 by "
        "default.",
    ),
    click.option("--weight-decay", type=float, help="Of the optimiser, AdamW; 0.01 by default."),
    click.option(
        "--clip-norm",
        type=float,
        help="Gradients of a larger norm are brought to it; 1 by default.",
    ),
    click.option(
        "--spatial-rank",
        type=int,
        help="Of the adapters by which the hybrid loss takes up what the reference shows; 32 by "
        "default.",
    ),
    click.option(
        "--spatial-learning-rate", type=float, help="Of these adapters; 0.0005 by default."
    ),
    click.option(
        "--spatial-skip",
        type=float,
        help="Share of the steps without these adapters; 0.2 by default.",
    ),
    click.option(
        "--inversion-steps",
        type=int,
        help="Steps of the noise that goes with the motion of one reference; 50 by default. Of "
        "several references no noise is kept.",
    ),
    click.option("--seed", type=int, help="Of all that is random; 0 by default."),
    click.option("--save-every", type=int, help="Steps between saves; 50 by default."),
    click.option(
        "--previews",
        type=int,
        help="Steps between early versions, each with a clip made by it; 100 by default, 0: none.",
    ),
    click.option("--preview-prompt", help="What those clips show; the first --prompt if not."),
    click.option(
        "--recompute",
        is_flag=True,
        help="Compute cheap results twice instead of keeping them, for less memory.",
    ),
    json_option(),
    model_options,
    click.option(
        "--weights",
        help="Type that the frozen model is held in: float32 (default), or that of --dtype "
        "for less memory.",
    ),
)
