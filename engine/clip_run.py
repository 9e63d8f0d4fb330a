"""Clips under way: each with its noise, its sample, and the step it is at."""

from typing import Any

import attrs
import torch
from torch import Tensor

from kinetiq.moft_guidance import ResolvedMoftGuidance
from kinetiq.request import ResolvedRequest


@attrs.define(eq=False)
class ClipRun:
    """One clip under way.

    Args:
        index: its place among the requests.
        request: what it will be.
        generator: draws the initial noise and the sampler's, in the stock pipelines' order.
        text: [tokens, width] of the prompt.
        negative_text: like `text`, or None where not guided.
        sample: [channels, frames, h, w], float32.
        former: like `sample`, the clean estimate of the step before.
        step: the next step, counted from 0.
        range: its range in the profiler.
        unguided: the same clip without guidance, while its keys and values are needed.
        shot: its number in its board, counted from 1; None: it is a request of its own.
    """

    index: int
    request: ResolvedRequest
    generator: torch.Generator
    text: Tensor
    negative_text: Tensor | None
    sample: Tensor
    former: Tensor
    step: int = 0
    range: Any = None
    unguided: "ClipRun | None" = None
    shot: int | None = None

    @property
    def guidance(self) -> ResolvedMoftGuidance | None:
        """The guidance that acts at the next step."""
        guidance = self.request.controls.guidance
        return guidance if guidance is not None and guidance.acts(self.step) else None

    @property
    def clips(self) -> "tuple[ClipRun, ...]":
        """What steps next: itself."""
        return (self,)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self.request.sampler.steps

    @property
    def taken_steps(self) -> int:
        """Steps that are taken."""
        return self.step

    @property
    def all_steps(self) -> int:
        """Steps that are to be taken."""
        return self.request.sampler.steps

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, latent height, latent width."""
        return self.request.shape

    @property
    def result(self) -> Tensor:
        """What it is once it is done."""
        return self.sample

    @property
    def name(self) -> str:
        """What errors call it."""
        of_board = "" if self.shot is None else f"shot {self.shot} of "
        return f"{of_board}request {self.index} ({self.request.prompt!r})"

    def copy(self) -> "ClipRun":
        """The same clip from here on, with the same noise to come."""
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return attrs.evolve(self, generator=generator, range=None)
