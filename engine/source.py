"""The source row: the reference clip riding along in the denoiser's batch.

At each step the reference's clean latents are noised to the timestep of the rows that read them,
so nothing is inverted and nothing is cached, and one source row serves every row of the batch
that reads the same reference at the same timestep.
"""

import hashlib

import attrs
import torch
from torch import Tensor

from kinetiq.clip import Clip
from kinetiq.errors import RequestError


@attrs.frozen
class Source:
    """How a reference becomes a row.

    Args:
        reference: the clip whose motion is wanted.
        prompt: conditions the source row; "" says nothing, None is the prompt of its reader.
        fresh: whether each timestep draws another noise, or all share one.
        seed: of that noise; None: derived from the reference, so equal references share a row.
    """

    reference: Clip
    prompt: str | None = ""
    fresh: bool = False
    seed: int | None = None

    def read_by(self, prompt: str) -> "Source":
        """This source for a reader with `prompt`: one whose own prompt is said."""
        return self if self.prompt is not None else attrs.evolve(self, prompt=prompt)


@attrs.frozen(eq=False)
class ResolvedSource:
    """A source at the size of the clip it steers.

    Args:
        latents: clean latents, [channels, frames, h, w].
        prompt: conditions the row.
        fresh: whether the noise differs between timesteps.
        seed: of the noise.
        key: what two sources with the same rows have in common.
    """

    latents: Tensor
    prompt: str
    fresh: bool
    seed: int
    key: str

    def noise(self, timestep: float) -> Tensor:
        """Unit noise for a row at `timestep`, the same for every row that reads this source."""
        seed = self.seed
        if self.fresh:
            seed = _hash(f"{self.seed} {timestep:.6f}")
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.latents.shape, generator=generator)


def resolve_source(source: Source, latents: Tensor) -> ResolvedSource:
    """Fix a source's noise and identity, given its clean latents [channels, frames, h, w].

    Raises:
        RequestError: its prompt is its reader's, and no reader was named.
    """
    if source.prompt is None:
        raise RequestError("source: must have a prompt before it is encoded; see Source.read_by")
    content = source.reference.fingerprint
    seed = _hash(content) if source.seed is None else source.seed
    shape = "x".join(map(str, latents.shape))
    key = f"{content} {shape} {source.fresh} {seed} {source.prompt}"
    return ResolvedSource(latents, source.prompt, source.fresh, seed, key)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
