"""Taps: places of a network whose activations are read, and running a network only that far.

A tap is a block of the network, named by its module path: "down_blocks.N", "mid_block" or
"up_blocks.N". What is read is the block's output, behind its motion modules and its up- or
downsampler. Motion is best seen in the output of the second up block: deeper blocks are too
coarse, later ones too fine.

Source: Xiao et al., "Video Diffusion Models are Training-free Motion Interpreter and Controller",
arXiv:2405.14864, sec. 3.2 and its ablation of layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kinetiq.errors import RequestError

DEFAULT_TAP = "up_blocks.1"


@dataclass(frozen=True)
class Tap:
    """A block whose output is read.

    Args:
        name: module path of the block.
        channels: of its output.
    """

    name: str
    channels: int


def list_taps(network: Any) -> tuple[Tap, ...]:
    """All taps of a network of a supported family, in the order in which its blocks run."""
    widths = tuple(network.config.block_out_channels)
    down = [Tap(f"down_blocks.{number}", width) for number, width in enumerate(widths)]
    up = [Tap(f"up_blocks.{number}", width) for number, width in enumerate(reversed(widths))]
    return (*down, Tap("mid_block", widths[-1]), *up)


def find_tap(network: Any, name: str | None = None) -> Tap:
    """The tap of this name; None is `DEFAULT_TAP`.

    Raises:
        RequestError: the network has no such block.
    """
    wanted = DEFAULT_TAP if name is None else name
    taps = list_taps(network)
    for tap in taps:
        if tap.name == wanted:
            return tap
    raise RequestError(
        f"tap: must be a block of this {type(network).__name__}: "
        f"{', '.join(tap.name for tap in taps)}; got {wanted!r}"
    )


class _ReachedTap(Exception):  # noqa: N818  it ends a forward pass that goes well
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def run_to_tap(network: Any, tap: Tap, run: Callable[[], object]) -> Tensor:
    """What the tap's block returns while `run` runs the network; nothing behind it is run.

    Args:
        network: which has the tap.
        tap: where to stop.
        run: calls the network.

    Returns:
        [rows * frames, channels, h, w].

    Raises:
        RequestError: the network ran to its end without running the tap's block.
    """

    def leave(_: object, __: object, output: Any) -> None:
        # Down blocks return what their skip connections carry as well.
        raise _ReachedTap(output[0] if isinstance(output, tuple) else output)

    handle = network.get_submodule(tap.name).register_forward_hook(leave)
    try:
        run()
    except _ReachedTap as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise RequestError(f"tap: {tap.name} must be run by the network, and was not")
