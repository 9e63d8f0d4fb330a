"""Low-rank adapters that are in a network only while a motion is trained.

    y = W x + dropout(up down x)

with `down` drawn from N(0, (1 / rank)^2) and `up` zero, so that an adapter begins as nothing. A
clip's spatial adapter learns, from single frames, what that clip shows; while the motion is
learned it stands as a constant, so the motion need not explain it, and then it is thrown away.

Adapters act through hooks on the linear layers. With no weights in use a hook changes nothing,
and once detached the network is what it was, bit for bit.

Source: MotionDirector, arXiv:2310.08465, sec. 4.1; initial values and rank as it was released.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn

from kinetiq.families import Family, temporal_transformers


class LowRank(NamedTuple):
    """The low-rank change of one linear layer: `down` [rank, in], `up` [out, rank]."""

    down: Tensor
    up: Tensor


def spatial_linears(network: nn.Module, family: Family) -> tuple[str, ...]:
    """Module paths of the linears that see one frame: self-attentions and feed-forwards."""
    temporal = tuple(f"{name}." for name in temporal_transformers(network, family))
    return tuple(
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and ".transformer_blocks." in name
        and not name.startswith(temporal)
        and (".attn1." in name or ".ff." in name)
    )


def draw_low_rank(
    network: nn.Module, paths: Iterable[str], rank: int, generator: torch.Generator
) -> dict[str, LowRank]:
    """Fresh float32 parameters for the linears at `paths`, on their devices; `up` is zero."""
    drawn = {}
    for path in paths:
        linear: Any = network.get_submodule(path)
        down = torch.randn(rank, linear.in_features, generator=generator) / rank
        up = torch.zeros(linear.out_features, rank)
        device = linear.weight.device
        drawn[path] = LowRank(nn.Parameter(down.to(device)), nn.Parameter(up.to(device)))
    return drawn


class Adapter:
    """Hooks that add low-rank changes to some linears of a network.

    Args:
        network: whose linears they are.
        paths: of the linears.
        dropout: share of the change's elements that are left out at each call, 0 to 1.
    """

    def __init__(self, network: nn.Module, paths: Iterable[str], dropout: float = 0.0) -> None:
        self._dropout = dropout
        self._weights: Mapping[str, LowRank] = {}
        self._handles = [
            network.get_submodule(path).register_forward_hook(self._hook(path)) for path in paths
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def acting(self, weights: Mapping[str, LowRank], *, constant: bool = False) -> Iterator[None]:
        """Let the adapter act inside the block.

        Args:
            weights: by path.
            constant: whether they are numbers only, for which no gradient is recorded; what they
                are given may still have one.
        """
        if constant:
            weights = {
                path: LowRank(low.down.detach(), low.up.detach()) for path, low in weights.items()
            }
        former, self._weights = self._weights, weights
        try:
            yield
        finally:
            self._weights = former

    def _hook(self, path: str) -> Any:
        def change(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            low = self._weights.get(path)
            if low is None:
                return None
            x = given[0]
            added = F.linear(F.linear(x, low.down.to(x.dtype)), low.up.to(x.dtype))
            if self._dropout:
                added = F.dropout(added, self._dropout)
            return out + added.to(out.dtype)

        return change


class Bypass:
    """Leads around a network's temporal layers, so that what is left is an image model.

    Args:
        network: of a supported family.
        family: of the network.
    """

    def __init__(self, network: nn.Module, family: Family) -> None:
        self._network = network
        temporal = set(temporal_transformers(network, family))
        self._stand_ins = {
            name: _Unchanged(in_tuple=name in temporal and family.name == "unet3d")
            for name, module in network.named_modules()
            if name in temporal or type(module).__name__ == "TemporalConvLayer"
        }

    @contextmanager
    def around(self) -> Iterator[None]:
        """Leave the temporal layers out inside the block."""
        replaced = {name: self._network.get_submodule(name) for name in self._stand_ins}
        try:
            for name, stand_in in self._stand_ins.items():
                self._network.set_submodule(name, stand_in)
            yield
        finally:
            for name, module in replaced.items():
                self._network.set_submodule(name, module)


class _Unchanged(nn.Module):
    def __init__(self, *, in_tuple: bool) -> None:
        super().__init__()
        self._in_tuple = in_tuple

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Any:
        """What was given, in the form in which the stock layer gives it."""
        return (hidden_states,) if self._in_tuple else hidden_states
