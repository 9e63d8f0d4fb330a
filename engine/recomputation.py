"""Training in less memory: cheap intermediate results are computed again in the backward pass.

Each layer (ResNet, convolution over frames, spatial or temporal transformer) keeps its input, and
of what it computes only results that cost much for their size: those of which one element takes
at least `KEPT_FROM` multiplications, which are the convolutions, the spatial attentions and the
wide projections. Normalisations, activations, narrow projections and attentions over a prompt or
over frames fill most of the memory and little of the time; they are computed again, bit for bit.
Layers before the first trained one have no gradient and keep nothing anyway.

Source: Chen et al., arXiv:1604.06174; what to keep by its cost, Korthikanti et al.,
arXiv:2205.05198, sec. 5.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kinetiq.attention import Signal
from kinetiq.control_tensors import ControlTensors
from kinetiq.denoiser import EagerDenoiser

KEPT_FROM = 768  # multiplications for one element of the result
_LAYERS = ("resnets", "attentions", "temp_convs", "temp_attentions", "motion_modules")
_FIRST_FACTOR = {  # of the products whose inner size is the last axis of this argument
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}


class Recomputation:
    """Lets the layers of a denoiser compute again what they do not keep.

    Args:
        denoiser: attached.
        trained: module paths of what has trained tensors inside, at any depth; a layer that holds
            none of them recomputes only if what it is given has a gradient.
    """

    def __init__(self, denoiser: EagerDenoiser, trained: Collection[str]) -> None:
        self._network: nn.Module = denoiser.network
        signal = denoiser.signal  # each layer must see again what it saw
        self._layers = {
            name: Recomputed(module, signal, any(path.startswith(f"{name}.") for path in trained))
            for name, module in self._network.named_modules()
            if name == "transformer_in" or name.rpartition(".")[0].rpartition(".")[2] in _LAYERS
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        """Recompute inside the block, which must hold the backward pass too."""
        try:
            for name, layer in self._layers.items():
                self._network.set_submodule(name, layer)
            yield
        finally:
            for name, layer in self._layers.items():
                self._network.set_submodule(name, layer.layer)


class Recomputed(nn.Module):
    """A layer that keeps its input and its costly results alone.

    Args:
        layer: it.
        signal: what the layer reads beside its arguments; the second time it reads the same.
        has_trained: whether it reads trained tensors from there.
    """

    def __init__(self, layer: nn.Module, signal: Signal, has_trained: bool) -> None:
        super().__init__()
        self.layer = layer
        self._signal = signal
        self._has_trained = has_trained

    def forward(self, *given: Any, **named: Any) -> Any:
        """What the layer computes."""
        tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor)]
        recorded = self._has_trained or any(tensor.requires_grad for tensor in tensors)
        if not (torch.is_grad_enabled() and recorded):
            return self.layer(*given, **named)
        signal = self._signal
        run = partial(self._run, signal.frames, signal.controls, signal.before_temporal)
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(run, *given, use_reentrant=False, context_fn=contexts, **named)

    def _run(
        self,
        frames: int,
        controls: ControlTensors,
        before_temporal: dict[str, Tensor],
        *given: Any,
        **named: Any,
    ) -> Any:
        signal = self._signal
        former = signal.frames, signal.controls, signal.before_temporal
        signal.frames, signal.controls, signal.before_temporal = frames, controls, before_temporal
        try:
            return self.layer(*given, **named)
        finally:
            signal.frames, signal.controls, signal.before_temporal = former


def work_an_element(operator: Any, given: tuple[Any, ...]) -> int:
    """Multiplications for one element of what an operator computes; 0 where they are few."""
    if operator in _FIRST_FACTOR:
        return int(given[_FIRST_FACTOR[operator]].shape[-1])
    if operator is torch.ops.aten.convolution.default:
        return int(given[1][0].numel())
    name = str(operator)
    if "frame_attention" in name:
        return 2 * int(given[1].shape[1])
    if "query_attention" in name or "scaled_dot_product" in name:
        return 2 * int(given[1].shape[-2])
    return 0


def _policy(_: Any, operator: Any, *given: Any, **__: Any) -> CheckpointPolicy:
    kept = work_an_element(operator, given) >= KEPT_FROM
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
