"""Measures of clips without a known truth: closed cases, and CLIP's own way of comparing."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import kinetiq as kq
from kinetiq.clip import Clip
from kinetiq.measures import (
    embed_frames,
    frame_consistency,
    load_image_text_model,
    prepare_frames,
    text_similarity,
    tracklet_fidelity,
)

RIGHT = np.stack([np.arange(4.0), np.zeros(4)], axis=1)
UP, STILL = -RIGHT[:, ::-1], np.zeros((4, 2))


class TestTracklets:
    @pytest.mark.parametrize(
        ("tracks", "reference", "wanted"),
        [
            ([RIGHT, UP], [UP, RIGHT], 1.0),
            ([RIGHT], [3 * RIGHT + 5], 1.0),  # directions alone
            ([-RIGHT], [RIGHT], -1.0),
            ([UP], [RIGHT], 0.0),
            ([STILL], [STILL], 1.0),
            ([STILL], [RIGHT], 0.0),
            # Each reference finds its like, one of two tracks does not: (1 + (1 + 0) / 2) / 2.
            ([RIGHT, UP], [RIGHT], 0.75),
            ([np.concatenate([RIGHT[:3], RIGHT[1:2]])], [RIGHT], 1 / 3),  # back in the last step
        ],
    )
    def test_closed_cases(self, tracks, reference, wanted):
        got = tracklet_fidelity(np.stack(tracks), np.stack(reference))
        assert got == pytest.approx(wanted, abs=1e-12)
        assert tracklet_fidelity(np.stack(reference), np.stack(tracks)) == pytest.approx(got)

    @pytest.mark.parametrize(
        ("tracks", "error", "words"),
        [
            (RIGHT, kq.ShapeError, r"tracks must be \[points, frames, 2\] .* got \[4, 2\]"),
            (RIGHT[None, :1], kq.ShapeError, r"two frames, got \[1, 1, 2\]"),
            (RIGHT[None, :3], kq.ShapeError, "must have the same frames, got 3 and 4"),
            (np.nan * RIGHT[None], kq.RequestError, "tracks must be finite, got NaN"),
        ],
    )
    def test_says_what_is_wrong(self, tracks, error, words):
        with pytest.raises(error, match=words):
            tracklet_fidelity(tracks, RIGHT[None])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model of random weights."""
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path_factory.mktemp("clip")
    tokenizer = tiny.tiny_tokenizer(path)
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tiny.MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": 16, "patch_size": 4}
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=text | sizes | depth, vision_config=vision | sizes | depth, projection_dim=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    for part in (model.vision_model, model.text_model):
        tiny.randomise(part)
    model.save_pretrained(path)
    return path


def prepared_by_transformers(clip):
    from transformers import CLIPImageProcessorPil

    square = {"height": 16, "width": 16}
    prepare = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
    images = [Image.fromarray(frame) for frame in clip.frames]
    return prepare(images, return_tensors="pt").pixel_values


def some_clip(frames=3, height=20, width=28, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (frames, 5, 7, 3), dtype=np.uint8)
    return Clip(coarse.repeat(height // 5, axis=1).repeat(width // 7, axis=2), 8.0)


class TestWithClip:
    def test_equals_what_transformers_computes(self, folder):
        """By its own forward pass, on frames that need no resizing."""
        loaded, clip = load_image_text_model(folder), some_clip().resize(16, 16)
        pixels = prepared_by_transformers(clip)
        words = loaded.tokenizer(["a red circle"], return_tensors="pt")
        with torch.no_grad():
            out = loaded.model(**words, pixel_values=pixels)
        wanted = (out.image_embeds @ out.text_embeds[0]).mean().item()
        assert (embed_frames(loaded, clip) - out.image_embeds).abs().max() <= 1e-4
        assert text_similarity(loaded, clip, "a red circle") == pytest.approx(wanted, abs=1e-4)
        assert abs(text_similarity(loaded, clip, "a blue square") - wanted) > 1e-3

    @pytest.mark.parametrize("size", [(20, 28), (35, 21), (10, 14)])
    def test_frames_are_prepared_as_by_transformers(self, size):
        clip = some_clip().resize(*size)
        wanted = prepared_by_transformers(clip)
        assert (prepare_frames(clip, 16) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        assert (wanted - wanted.flip(-1)).abs().max() > 0.1

    def test_consistency_is_of_all_pairs(self, folder):
        loaded, clip = load_image_text_model(folder), some_clip()
        embedded = embed_frames(loaded, clip)
        assert embedded.norm(dim=-1) == pytest.approx(1, abs=1e-5)
        pairs = [float(embedded[a] @ embedded[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
        assert frame_consistency(loaded, clip) == pytest.approx(np.mean(pairs), abs=1e-6)
        still = Clip(clip.frames[:1].repeat(4, axis=0), 8.0)
        assert frame_consistency(loaded, still) == pytest.approx(1.0, abs=1e-6)
        assert frame_consistency(loaded, clip) < 0.999
        with pytest.raises(kq.RequestError, match="must have at least 2 frames, got 1"):
            frame_consistency(loaded, some_clip(frames=1))

    def test_what_is_no_model_is_refused(self, folder, tmp_path):
        with pytest.raises(kq.CheckpointError, match="must be the folder of a CLIP model"):
            load_image_text_model(tmp_path)
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(kq.CheckpointError, match="must hold a CLIP model as safetensors"):
            load_image_text_model(tmp_path)
