"""Prompts: what the stock pipeline computes, alone or beside others, and words for bad input."""

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from kinetiq.checkpoint import Checkpoint, load_checkpoint
from kinetiq.errors import RequestError
from kinetiq.text import PromptWarning, encode_prompts

PROMPTS = (
    "a red circle moving left",
    "",
    "a striped blue square on a dark green background",
    "Ünïcode 火 \0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import AnimateDiffPipeline

    return AnimateDiffPipeline.from_pretrained(folder)


def stock(pipeline: Any, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)[0]


def test_is_what_the_stock_pipeline_computes(checkpoint: Checkpoint, pipeline: Any):
    got = encode_prompts(checkpoint, PROMPTS)
    assert got.shape == (4, tiny.MAX_TOKENS, tiny.CROSS_WIDTH)
    assert torch.equal(got, torch.cat([stock(pipeline, prompt) for prompt in PROMPTS]))
    assert not got.requires_grad
    assert not got.is_inference()  # guidance differentiates through what reads it


def test_passes_the_mask_where_the_encoder_asks_for_it(
    checkpoint: Checkpoint, pipeline: Any, monkeypatch: pytest.MonkeyPatch
):
    plain = encode_prompts(checkpoint, PROMPTS)
    for parts in (checkpoint, pipeline):
        monkeypatch.setattr(parts.text_encoder.config, "use_attention_mask", True, raising=False)
    masked = encode_prompts(checkpoint, PROMPTS)
    assert torch.equal(masked, torch.cat([stock(pipeline, prompt) for prompt in PROMPTS]))
    assert not torch.equal(masked, plain)


def test_a_prompt_does_not_depend_on_its_neighbours_and_is_encoded_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    alone = encode_prompts(checkpoint, ["a red ring"])
    calls = []
    forward = checkpoint.text_encoder.forward
    monkeypatch.setattr(
        checkpoint.text_encoder, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    many = encode_prompts(checkpoint, ["a red ring", "a blue cross", "a red ring", *[""] * 5])
    assert len(calls) == 3
    assert torch.equal(many[0], alone[0])
    assert torch.equal(many[2], alone[0])
    assert not torch.equal(many[1], alone[0])


def test_has_the_type_of_the_encoder(folder: Path):
    assert encode_prompts(load_checkpoint(folder, dtype="bfloat16"), ["a"]).dtype == torch.bfloat16


def test_warns_what_was_cut_off(
    checkpoint: Checkpoint, pipeline: Any, caplog: pytest.LogCaptureFixture
):
    fits, long = " ".join(["red"] * 22), " ".join(["red"] * 22 + ["blue", "square"])
    encode_prompts(checkpoint, [fits])  # exactly full: no warning, or the test run would fail
    with caplog.at_level(logging.DEBUG):
        with pytest.warns(PromptWarning) as caught:
            got = encode_prompts(checkpoint, [long, "a", long])
        assert caplog.records == []
    assert len(caught) == 1
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    assert message.endswith(
        "must have at most 22 tokens, got 24; the end was cut off: 'blue square'"
    )
    assert torch.equal(got[0], stock(pipeline, long)[0])
    assert torch.equal(got[0], encode_prompts(checkpoint, [fits])[0])


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("a red circle", "prompts must be a list of at least one text, got 'a red circle'"),
        ([], r"at least one text, got \[\]"),
        (None, "at least one text, got None"),
        (["a", 3], r"a prompt must be text \(str\), got 3"),
        (["a", None], r"a prompt must be text \(str\), got None"),
        ([b"a"], r"a prompt must be text \(str\), got b'a'"),
        (["\ud800"], "a prompt must be valid Unicode"),
    ],
)
def test_says_what_prompts_must_be(checkpoint: Checkpoint, prompts: Any, words: str):
    with pytest.raises(RequestError, match=words):
        encode_prompts(checkpoint, prompts)
