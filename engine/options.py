"""Options that several commands share, each said once: decorators, used as click's own are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

PATH = click.Path(path_type=Path)
CONTROLS = ("motion", "query", "both", "none")
DIRECTIONS = ("left", "right", "up", "down")

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
max_clips_option = click.option(
    "--max-clips",
    type=click.IntRange(1, 1024),
    default=8,
    show_default=True,
    help="Clips that the network sees at a time.",
)


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

# Of one clip: of `generate`, and of each line of a file of `batch`.
clip_options = joined(
    click.option("--prompt", required=True, help="What the clip shows."),
    click.option(
        "--reference",
        type=PATH,
        help="Clip whose motion is wanted: a video, a gif, a webp or a folder of images.",
    ),
    click.option(
        "--control",
        type=click.Choice(CONTROLS),
        help="motion (default with a reference): motion injection; query: query injection, "
        "the paper's; both; none (default without).",
    ),
    until_option,
    click.option(
        "--sites",
        help="spatial (default), temporal, both, or names of sites, comma-separated (query "
        "injection).",
    ),
    click.option(
        "--reduce-leak",
        is_flag=True,
        default=None,
        help="Keep the clip's own mean of the queries over frames (query injection).",
    ),
    click.option(
        "--parts", help="Which of q, k and v are injected; qkv by default (motion injection)."
    ),
    click.option(
        "--halves",
        type=click.Choice(("both", "cond")),
        help="Which halves of guidance are steered; both by default.",
    ),
    click.option(
        "--moft",
        type=PATH,
        help="Clip whose motion gradients on the latents follow, step by step (MOFT guidance).",
    ),
    click.option(
        "--direction",
        type=click.Choice(DIRECTIONS),
        help="Where gradients move everything, without a clip.",
    ),
    click.option(
        "--speed",
        type=float,
        help="Factor on the motion of a direction; 1 by default, 0 for stillness.",
    ),
    click.option(
        "--drag",
        "drags",
        multiple=True,
        metavar="X,Y:X,Y",
        help="Gradients move what is at the first point to the second, in pixels from the top "
        "left; as often as wanted.",
    ),
    click.option(
        "--region",
        "regions",
        multiple=True,
        metavar="MASK[:MOTION]",
        help="Image, or for a --reference clip of as many frames, white where the motion is "
        "wanted. With a motion of its own, a direction or a clip (mask.png:right), gradients "
        "move that region; as often as wanted. For gradients a mask should hug the shape and "
        "the path that it is to take.",
    ),
    click.option("--moft-weight", type=float, help="How hard gradients pull; 10 by default."),
    click.option("--moft-step-size", type=float, help="Of gradients; 0.5 by default."),
    click.option(
        "--moft-window",
        metavar="A,B[,C]",
        help="Shares of the steps between which gradients act, such as 0.12,0.48 (default). Of a "
        "--drag three shares of the steps that remain: motion acts down to B, and that points look "
        "the same from A to C; 0.76,0.72,0.2 by default.",
    ),
    click.option(
        "--moft-tap",
        metavar="PATH",
        help="Block or temporal attention whose output gradients compare; up_blocks.1 by default.",
    ),
    fit_option("How clips to move like are brought to the clip's size; crop by default."),
    motions_option(
        "A motion that was learned before, such as dance.safetensors or -0.5*dance.safetensors; "
        "several of a kind are added up, at the frames and the size of the first. Of an embedding "
        "and a LoRA, the first that has noise brings it, and the other's --noise-prior is 0."
    ),
    click.option(
        "--motion-scale",
        type=float,
        help="Factor on what --motion adds; 1 by default. Below 0 an embedding's motion is "
        "reversed; of a LoRA it is arithmetic on weights alone.",
    ),
    click.option(
        "--value-scale", type=float, help="Further factor on the value part of a motion embedding."
    ),
    click.option(
        "--debias",
        type=click.Choice(("difference", "none", "mean", "drop")),
        help="How appearance is kept out of a motion embedding: difference by default; drop leaves "
        "motions of the camera.",
    ),
    click.option(
        "--noise-prior",
        type=float,
        help="Share of the learned reference's own noise at the start, 0 to 1; by default what "
        "the motion's file says, else 0.5 for a motion embedding, 0.2 for a LoRA, of what "
        "noise there is.",
    ),
    click.option(
        "--highway",
        type=click.Choice(("all", "released", "none")),
        help="Let skip connections bypass a LoRA's changes; as it was trained by default.",
    ),
    beta_option,
    click.option("--negative-prompt", default="", help="What the clip does not show."),
    sampling_options,
    click.option("--sampler", help="ddim, ddpm, euler, dpm++2m or lcm."),
    click.option("--eta", type=float, default=0.0, show_default=True, help="Noise of DDIM."),
    size_options("Frames of the clip.", "HEIGHTxWIDTH in pixels."),
    fps_option,
    click.option(
        "--scale",
        type=click.IntRange(1, 64),
        default=1,
        show_default=True,
        help="Enlarge what is written by a whole number.",
    ),
)
