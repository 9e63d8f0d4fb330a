"""Prompts to the text encoder's hidden states."""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kinetiq.errors import KinetiqWarning, RequestError

_SHOWN = 60  # characters of a prompt in a message


class PromptWarning(KinetiqWarning):
    """A prompt is longer than the text encoder reads, and its end was cut off."""


class TextParts(Protocol):
    """What encodes prompts: a `Checkpoint`, or any diffusers pipeline of the CLIP kind."""

    @property
    def tokenizer(self) -> Any:
        """A CLIPTokenizer."""

    @property
    def text_encoder(self) -> Any:
        """A CLIPTextModel."""


def encode_prompts(parts: TextParts, prompts: Sequence[str]) -> Tensor:
    """Encode prompts as the stock pipelines of diffusers encode a single one.

    Each distinct prompt goes through the encoder alone and once, so that no result depends on
    the prompts beside it.

    Args:
        parts: the tokenizer and the text encoder.
        prompts: at least one; "" is a prompt too.

    Returns:
        [prompts, tokens, width], on the text encoder's device and in its type.

    Raises:
        RequestError: `prompts` is empty or not a sequence of text.

    Warns:
        PromptWarning: a prompt was cut off, and where.
    """
    _require_texts(prompts)
    encoded = {}
    for prompt in dict.fromkeys(prompts):
        with torch.no_grad():
            encoded[prompt] = _encode(parts, prompt)
    return torch.cat([encoded[prompt] for prompt in prompts])


def _encode(parts: TextParts, prompt: str) -> Tensor:
    """One prompt, [1, tokens, width]."""
    tokenizer, encoder = parts.tokenizer, parts.text_encoder
    longest = tokenizer.model_max_length
    inputs = tokenizer(
        [prompt], padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
    )
    # verbose=False: without a limit the tokenizer logs that the text is too long for the model.
    tokens = tokenizer([prompt], verbose=False).input_ids[0]
    if len(tokens) > longest:
        cut = tokenizer.decode(tokens[longest - 1 : -1])
        warnings.warn(
            PromptWarning(
                f"encode_prompts: prompt {_shortened(prompt)!r} must have at most {longest - 2} "
                f"tokens, got {len(tokens) - 2}; the end was cut off: {_shortened(cut)!r}"
            ),
            stacklevel=3,  # the caller of encode_prompts
        )
    masked = getattr(encoder.config, "use_attention_mask", False)
    mask = inputs.attention_mask.to(encoder.device) if masked else None
    states: Tensor = encoder(inputs.input_ids.to(encoder.device), attention_mask=mask)[0]
    return states.to(encoder.dtype)


def find_words(tokenizer: Any, prompt: str, words: str) -> tuple[int, ...]:
    """Where a prompt holds words: the positions of their tokens, at each place that has them all.

    Args:
        tokenizer: a CLIPTokenizer.
        prompt: what is encoded, as `encode_prompts` does.
        words: at least one.

    Raises:
        RequestError: the prompt does not hold them, or only behind what the text encoder reads.
    """
    longest = tokenizer.model_max_length
    tokens = tokenizer([prompt], truncation=True, max_length=longest).input_ids[0]
    wanted = tokenizer([words], add_special_tokens=False).input_ids[0]
    found = [
        start + offset
        for start in range(len(tokens) - len(wanted) + 1)
        if tokens[start : start + len(wanted)] == wanted
        for offset in range(len(wanted))
    ]
    if not wanted or not found:
        raise RequestError(
            f"prompt: the {longest - 2} tokens of a prompt that are read must hold "
            f"{_shortened(words)!r} as words, got {_shortened(prompt)!r}"
        )
    return tuple(sorted(set(found)))


def _require_texts(prompts: object) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise RequestError(
            f"encode_prompts: prompts must be a list of at least one text, got {prompts!r}"
        )
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise RequestError(f"encode_prompts: a prompt must be text (str), got {prompt!r}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"encode_prompts: a prompt must be valid Unicode, got {prompt!r}"
            ) from error


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
