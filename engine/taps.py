"""Taps: places of a network whose activations are read, and running a network only that far.

A tap is a block of the network, named by its module path: "down_blocks.N", "mid_block" or
"up_blocks.N". What is read is the block's output, behind its motion modules and its up- or
downsampler. Motion is best seen in the output of the second up block: deeper blocks are too
coarse, later ones too fine. A temporal self-attention is a tap too, by its module path; what is
read there is its projected output, which is what the attention adds.

Source: Xiao et al., "Video Diffusion Models are Training-free Motion Interpreter and Controller",
arXiv:2405.14864, sec. 3.2 and its ablation of layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kinetiq.errors import RequestError
from kinetiq.families import Site, SiteKind, detect_family, list_sites

DEFAULT_TAP = "up_blocks.1"


@dataclass(frozen=True)
class Tap:
    """A block or a temporal self-attention whose output is read.

    Args:
        name: its module path.
        channels: of its output.
        is_attention: whether it is an attention.
    """

    name: str
    channels: int
    is_attention: bool = False

    @property
    def block(self) -> str:
        """The block that it is, or lies in."""
        first, _, rest = self.name.partition(".")
        number = rest.partition(".")[0]
        return f"{first}.{number}" if number.isdecimal() else first

    @property
    def last_layer(self) -> str:
        """Module path of the layer behind which nothing is run: itself or, whole, a transformer."""
        return self.name.partition(".transformer_blocks.")[0]


def list_taps(network: Any) -> tuple[Tap, ...]:
    """All blocks of a network of a supported family as taps, in the order in which they run."""
    widths = tuple(network.config.block_out_channels)
    down = [Tap(f"down_blocks.{number}", width) for number, width in enumerate(widths)]
    up = [Tap(f"up_blocks.{number}", width) for number, width in enumerate(reversed(widths))]
    return (*down, Tap("mid_block", widths[-1]), *up)


def find_tap(network: Any, name: str | None = None, sites: Sequence[Site] | None = None) -> Tap:
    """The tap of this name; None is `DEFAULT_TAP`.

    Args:
        network: of a supported family.
        name: of a block or a temporal self-attention.
        sites: the network's, where they are known; layers that are wrapped hide theirs.

    Raises:
        RequestError: the network has neither of this name.
    """
    wanted = DEFAULT_TAP if name is None else name
    blocks = list_taps(network)
    for tap in blocks:
        if tap.name == wanted:
            return tap
    if sites is None:
        sites = list_sites(network, detect_family(network))
    temporal = [site for site in sites if site.kind is SiteKind.TEMPORAL]
    for site in temporal:
        if site.name == wanted:
            return Tap(site.name, site.width, is_attention=True)
    raise RequestError(
        f"tap: must be a block of this {type(network).__name__}: "
        f"{', '.join(tap.name for tap in blocks)}; or one of its temporal self-attentions, such "
        f"as {temporal[-1].name}; got {wanted!r}"
    )


class _ReachedTap(Exception):  # noqa: N818  it ends a forward pass that goes well
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def run_to_tap(network: Any, tap: Tap, run: Callable[[], object]) -> Tensor:
    """What the tap's last layer returns while `run` runs the network; nothing behind it is run.

    Args:
        network: which has the tap.
        tap: where to stop.
        run: calls the network.

    Returns:
        [rows * frames, channels, h, w].

    Raises:
        RequestError: the network ran to its end without running that layer.
    """

    def leave(_: object, __: object, output: Any) -> None:
        # Down blocks return what their skip connections carry as well.
        raise _ReachedTap(output[0] if isinstance(output, tuple) else output)

    handle = network.get_submodule(tap.last_layer).register_forward_hook(leave)
    try:
        run()
    except _ReachedTap as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise RequestError(f"tap: {tap.name} must be run by the network, and was not")
