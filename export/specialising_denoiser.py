"""What runtimes that compile a graph in seconds have in common: a program for what is used.

There are at most two programs of prediction at a time, one without controls and one with all kinds
that have been used so far, since a kind that a graph has takes time also where it is neutral. All
are taken out of the one file and share its weights on the disk.
"""

import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinetiq.errors import WorkError
from kinetiq.export.denoiser import GraphDenoiser
from kinetiq.export.engine_log import says_no_room
from kinetiq.export.metadata import read_network
from kinetiq.export.specialisation import keep_controls

_PLACE = re.compile(r"Exception from |Check '.*' failed at ")
_SAID = 4  # lines of an error; OpenVINO names an operator that it does not know in the fourth


class SpecialisingDenoiser(GraphDenoiser):
    """An exported network whose graph is cut to the kinds of control that are used.

    Args:
        path: of the exported network.
        where: what messages call the runtime.
        device: where inputs are to be.

    Raises:
        CheckpointError: the file is damaged or not ours.
    """

    def __init__(self, path: str | Path, where: str, device: torch.device) -> None:
        self._model, metadata = read_network(path)
        super().__init__(metadata, where, device)
        self._folder = Path(path).resolve().parent
        self._carried: frozenset[str] = frozenset()
        self._programs: dict[tuple[frozenset[str], str], Any] = {}

    @abstractmethod
    def compile(self, model: Any, folder: Path) -> Any:
        """What runs an `onnx.ModelProto` whose outside weights lie in a folder."""

    @abstractmethod
    def run_model(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs of a variant of the network in float32, by name, to look at."""

    def wanted(self, kinds: Collection[str]) -> frozenset[str]:
        """None of them, or all that have been used so far."""
        if not kinds:
            return frozenset()
        if not self._carried.issuperset(kinds):
            for key in [key for key in self._programs if key[0]]:
                del self._programs[key]  # before the next is there: a network may be large
            self._carried |= frozenset(kinds)
        return self._carried

    def program(self, kinds: frozenset[str], output: str) -> Any:
        """What runs the graph of these kinds to this output."""
        if (kinds, output) not in self._programs:
            model = keep_controls(self._model, kinds, outputs=(output,))
            self._programs[kinds, output] = self.compile(model, self._folder)
        return self._programs[kinds, output]


def explained(error: Exception, where: str, what: str, device: torch.device) -> Exception:
    """The error to raise; PyTorch's own where memory ran out, for which a batch is split.

    Args:
        error: of a runtime.
        where: what messages call the runtime.
        what: it must do.
        device: where.
    """
    said = first_words(error)
    if isinstance(error, MemoryError) or says_no_room(str(error)):
        return torch.OutOfMemoryError(
            f"{where}: must {what} in the memory of {device}, and it does not suffice: {said}"
        )
    return WorkError(f"{where}: must {what}, and failed: {said}")


def first_words(error: Exception) -> str:
    """What a runtime says first, but for the places in its own source that OpenVINO begins with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not _PLACE.match(line)] or lines
    return " ".join(said[:_SAID]) or type(error).__name__
