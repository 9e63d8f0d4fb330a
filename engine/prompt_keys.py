"""Keys and values of prompts at cross-attention sites, computed once a prompt.

They depend on the prompt alone, so frames and steps share them.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetiq.attention import project_prompt
from kinetiq.control_tensors import KeyValueBank
from kinetiq.families import Site, SiteKind

KEPT_PROMPTS = 64  # of SD 1.5 in bfloat16, 4 MB each

_Banks = Mapping[int, KeyValueBank]  # by index of the cross-attention site


@dataclass(frozen=True, eq=False)
class _Batch:
    """The prompts of one batch, and what was made of them."""

    text: Tensor
    weights: tuple[int, ...]
    banks: _Banks


class PromptKeys:
    """Remembers keys and values of the prompts that were used last.

    A prompt is known by the bits of its text, so it may be encoded again, and stand in any row.
    Weights of the projections may be changed in place: what was made with others is forgotten.

    Args:
        network: of a supported family.
        sites: its sites.
    """

    def __init__(self, network: Any, sites: Sequence[Site]) -> None:
        self._projections = {
            index: network.get_submodule(site.name)
            for index, site in enumerate(sites)
            if site.kind is SiteKind.CROSS
        }
        self._prompts: OrderedDict[bytes, _Banks] = OrderedDict()
        self._last: _Batch | None = None

    def of(self, text: Tensor) -> _Banks:
        """Keys and values of prompts [rows, tokens, width], a slot a row, by site.

        The very tensors of the last call are returned while the prompts are the same. To see that
        waits for the GPU once, which a sampler that looks for NaN has done just before.
        """
        weights = tuple(
            _version(projection.weight)
            for attention in self._projections.values()
            for projection in (attention.to_k, attention.to_v)
        )
        last = self._last
        if last is not None and last.weights != weights:
            self._prompts.clear()
            last = None
        if last is not None and _same(last.text, text):
            return last.banks
        digests = [_digest(row) for row in text]
        for digest, row in zip(digests, text, strict=True):
            if digest not in self._prompts:
                self._prompts[digest] = self._project(row)
            self._prompts.move_to_end(digest)
        prompts = [self._prompts[digest] for digest in digests]
        banks = {
            site: KeyValueBank(
                torch.cat([prompt[site].key for prompt in prompts]),
                torch.cat([prompt[site].value for prompt in prompts]),
            )
            for site in self._projections
        }
        while len(self._prompts) > KEPT_PROMPTS:
            self._prompts.popitem(last=False)
        self._last = _Batch(text.clone(), weights, banks)
        return banks

    def _project(self, prompt: Tensor) -> _Banks:
        """Of one prompt [tokens, width]: alone, so that rounding does not depend on the others."""
        return {
            site: KeyValueBank(*project_prompt(attention, prompt[None]))
            for site, attention in self._projections.items()
        }


def _same(known: Tensor, given: Tensor) -> bool:
    alike = (known.shape, known.dtype, known.device) == (given.shape, given.dtype, given.device)
    return alike and torch.equal(known, given)


def _digest(prompt: Tensor) -> bytes:
    """Of the bits, the type and the shape of a text [tokens, width]."""
    bits = prompt.detach().cpu().contiguous().view(torch.uint8).numpy()
    said = f"{prompt.dtype} {tuple(prompt.shape)} ".encode()
    return hashlib.blake2b(said + bits.tobytes(), digest_size=16).digest()


def _version(weight: Tensor) -> int:
    """How often a weight was changed in place; those of inference mode do not say it."""
    return -1 if weight.is_inference() else weight._version  # noqa: SLF001  no public way
