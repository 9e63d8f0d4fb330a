"""Convolutions whose kernels are zero but for their centres, run as what they are.

A 3x3 kernel with zero off-centre taps is a 1x1 kernel at nine times the work. The embedded
network is built of such kernels; any other network keeps its own.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn

from kinetiq.errors import CheckpointError


class CentreTapConvolution(nn.Conv2d):
    """A 3x3 convolution that reads its centre taps alone; shares the replaced one's parameters."""

    def __init__(self, replaced: nn.Conv2d) -> None:
        with torch.device("meta"):  # parameters that are given away at once
            super().__init__(replaced.in_channels, replaced.out_channels, 3, padding=1, bias=False)
        self.weight = replaced.weight
        self.bias = replaced.bias
        self.register_load_state_dict_pre_hook(_refuse_other_taps)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [n, channels, h, w] to the same height and width."""
        return F.conv2d(x, self.weight[:, :, 1:2, 1:2], self.bias)


def _refuse_other_taps(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    weight = weights.get(prefix + "weight")
    if weight is not None and _reads_outside(weight):
        raise CheckpointError(
            f"load: {prefix}weight must be zero but for its centre while the denoiser is attached; "
            "detach it, load, and attach it again"
        )


def find_centre_taps(network: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of `network` that `CentreTapConvolution` can stand in for, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and _reads_centre_alone(module)
    }


def _reads_centre_alone(module: nn.Conv2d) -> bool:
    plain = (
        module.kernel_size == (3, 3)
        and module.stride == module.dilation == (1, 1)
        and module.padding == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )
    if not plain or module.weight.is_meta:
        return False
    return not _reads_outside(module.weight.detach())


def _reads_outside(weight: Tensor) -> bool:
    outside = torch.ones(3, 3, dtype=torch.bool, device=weight.device)
    outside[1, 1] = False
    first = weight[:1, :1]  # nearly every kernel is told apart here
    return bool(first[:, :, outside].any()) or bool(weight[:, :, outside].any())
