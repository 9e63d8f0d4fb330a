"""Boards of shots under way: which clips step next, and how their shots see each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from kinetiq.clip_run import ClipRun
from kinetiq.control_tensors import PatchMatches
from kinetiq.denoiser import Watched
from kinetiq.patch_matching import resized
from kinetiq.query_flow import flow_at_levels
from kinetiq.refinement import patches_at_levels
from kinetiq.rows import BoardState
from kinetiq.shots import ResolvedShots
from kinetiq.subject_masks import attention_map, drop_places, find_masks, subject_masks

DecodeFrames = Callable[[Tensor], np.ndarray]


@attrs.frozen(eq=False)
class BoardLatents:
    """A board that is sampled.

    Args:
        latents: of each shot, [channels, frames, h, w].
        masks: float32 [shots, frames, h, w] of the last step that had any, or None.
    """

    latents: tuple[Tensor, ...]
    masks: Tensor | None


@attrs.define(eq=False)
class BoardRun:
    """One board under way. Its clips step together and are never in different batches.

    Args:
        index: its place among the requests.
        board: what it will be.
        shots: at the same step.
        vanilla: the shots left alone; () while they do not run.
        looks: whether the shots left alone run by themselves, before the others.
        range: its range in the profiler.
        attention: [shots, frames, h, w], the attention to the subject's words, summed over all
            steps that were watched.
        features: float32 [shots, frames, channels, h, w] at the latents' size, of the shots left
            alone at the last step that was watched; None once they are matched.
        masks: [shots, frames, h, w] of the last step that had any.
        flow: by tokens of a site, what is where in the key frames; None: queries tell.
        refine: by tokens of a site, patches that match at the next step; None: not refined.
        first_steps_taken: of the steps before the shots.
    """

    index: int
    board: ResolvedShots
    shots: tuple[ClipRun, ...]
    vanilla: tuple[ClipRun, ...] = ()
    looks: bool = False
    range: Any = None
    attention: Tensor | None = None
    features: Tensor | None = None
    masks: Tensor | None = None
    flow: Mapping[int, Tensor] | None = None
    refine: Mapping[int, PatchMatches] | None = None
    first_steps_taken: int = 0

    @classmethod
    def start(cls, index: int, board: ResolvedShots, shots: Sequence[ClipRun]) -> "BoardRun":
        """A board whose shots have taken no step."""
        run = cls(index, board, tuple(shots), looks=board.map_step is not None)
        if run.looks or board.guided_until > 0:
            run.vanilla = tuple(shot.copy() for shot in run.shots)
        return run

    @property
    def step(self) -> int:
        """The next step of the shots, counted from 0."""
        return self.shots[0].step

    @property
    def clips(self) -> tuple[ClipRun, ...]:
        """What steps next."""
        return self.vanilla if self.looks else (*self.shots, *self.vanilla)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self.board.steps

    @property
    def taken_steps(self) -> int:
        """Steps that are taken, but for those beside the shots."""
        return len(self.shots) * (self.first_steps_taken + self.step)

    @property
    def all_steps(self) -> int:
        """Steps that are to be taken, but for those beside the shots."""
        return len(self.shots) * (self.board.first_steps + self.board.steps)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, latent height, latent width."""
        return self.board.shape

    @property
    def result(self) -> BoardLatents:
        """What it is once it is done."""
        masks = None if self.masks is None else self.masks.float().cpu()
        return BoardLatents(tuple(shot.sample for shot in self.shots), masks)

    @property
    def watched(self) -> tuple[ClipRun, ...]:
        """The clips that tell at the next step what masks or matches to come depend on.

        The shots left alone; where they do not run, the shots themselves, which say where their
        subject is as well.
        """
        return (self.vanilla or self.shots) if self.needs_words or self.needs_features else ()

    @property
    def needs_words(self) -> bool:
        """Whether masks to come depend on the attention to the subject's words at the next step."""
        board = self.board
        if not board.reads_words or board.map_step is not None:
            return board.reads_words and self.looks
        return self.step + 1 < max(board.keys[1], board.refined[1])

    @property
    def needs_features(self) -> bool:
        """Whether matches to come depend on the features of the next step."""
        board = self.board
        if board.map_step is not None:
            last = self.first_steps_taken + 1 == board.first_steps
            return board.reads_features and self.looks and last
        return board.reads_features and board.refines(self.step + 1)

    @property
    def words(self) -> Tensor:
        """[shots, text tokens], the weights of the subject's words in each prompt."""
        weights = torch.zeros(len(self.shots), self.shots[0].text.shape[0])
        for row, positions in zip(weights, self.board.words, strict=True):
            row[list(positions)] = 1 / len(positions)
        return weights

    def prepare(self, decode: DecodeFrames) -> None:
        """Find masks and matches for the next step.

        Raises:
            RequestError: what finds masks returned none that fit.
            WorkError: it failed.
        """
        board, step = self.board, self.step
        if self.looks or not (board.shares_keys(step) or board.refines(step)):
            return
        if board.map_step is None:
            self._find_masks(decode)
        if board.refines(step) and self.features is not None and self.masks is not None:
            self.refine = patches_at_levels(self.features, self.masks, board.alpha)
            self.features = None

    def state(self, first: int) -> BoardState | None:
        """How the shots see each other at the next step; None where they do not.

        Args:
            first: place of the first of `clips` in the batch.
        """
        board, step, count = self.board, self.step, len(self.shots)
        if self.looks:
            return None
        shows = board.shares_keys(step) and self.masks is not None
        flows = step >= board.preserved and board.key_frames is not None
        return BoardState(
            shots=tuple(range(first, first + count)),
            vanilla=tuple(range(first + count, first + len(self.clips))),
            masks=self._shown() if shows else None,
            preserves=step < board.preserved,
            key_frames=board.key_frames if flows else None,
            flow=self.flow,
            refine=self.refine if board.refines(step) else None,
            queries_conditional_only=board.queries_conditional_only,
            refine_conditional_only=board.refine_conditional_only,
        )

    def advance(self, watched: Watched | None, decode: DecodeFrames) -> None:
        """Take in what was seen at the step that was just taken, and decide what runs next.

        Args:
            watched: of the clips that were watched, if any were.
            decode: the frames of clean latents.

        Raises:
            RequestError: what finds masks returned none that fit.
            WorkError: it failed.
        """
        if watched is not None:
            self._take_in(watched)
        if not self.looks:
            if self.step >= self.board.guided_until:
                self.vanilla = ()
            return
        self.first_steps_taken += 1
        if self.first_steps_taken < self.board.first_steps:
            return
        self._find_masks(decode)
        if self.board.flows:
            self.flow = self._map_flow()
        if self.board.refined == (0, 0):
            self.features = None
        self.looks = False
        preserves = self.board.guided_until > 0
        self.vanilla = tuple(shot.copy() for shot in self.shots) if preserves else ()

    def _take_in(self, watched: Watched) -> None:
        size = self.shape[1:]
        if watched.words:
            seen = attention_map(watched.words, size)
            self.attention = seen if self.attention is None else self.attention + seen
        if watched.features is not None:
            self.features = resized(watched.features, size)

    def _find_masks(self, decode: DecodeFrames) -> None:
        board = self.board
        if board.given is not None:
            self.masks = board.given
        elif board.find is not None and self._estimated[0].step > 0:
            frames = tuple(decode(run.former) for run in self._estimated)
            self.masks = find_masks(board.find, frames, board.shape)
        elif board.find is None and self.attention is not None:
            self.masks = subject_masks(self.attention)
        if self.masks is not None:
            self.masks = self.masks.to(self.shots[0].sample.device)

    @property
    def _estimated(self) -> tuple[ClipRun, ...]:
        return self.vanilla or self.shots

    def _map_flow(self) -> Mapping[int, Tensor]:
        features, key_frames = self.features, self.board.key_frames
        assert features is not None and key_frames is not None  # noqa: S101, PT018  it was watched
        return flow_at_levels(features, key_frames.to(features.device))

    def _shown(self) -> Tensor:
        """What the others see of each shot at the next step."""
        assert self.masks is not None  # noqa: S101  asked for where there are some
        seeds = [shot.request.seed for shot in self.shots]
        shown = drop_places(self.masks, self.board.mask_dropout, seeds, self.step)
        return self.board.keys_weight * shown
