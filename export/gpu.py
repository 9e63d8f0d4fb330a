"""Which GPU is at hand, as records of engines name it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """A model of GPU; what is fastest on one may not be on another of its architecture.

    Args:
        name: such as "NVIDIA GeForce RTX 3090".
        multiprocessors: how many it has; cut-down ones go by the same name.
    """

    name: str
    multiprocessors: int

    def __str__(self) -> str:
        return f"{self.name} of {self.multiprocessors} multiprocessors"


def describe_gpu(device: torch.device | None = None) -> Gpu:
    """The model of a GPU; None: of the current one."""
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, found.multi_processor_count)
