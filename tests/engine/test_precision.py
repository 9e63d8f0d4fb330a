"""Float32 on a GPU is float32: cuDNN's TF32 is off where a network or a VAE runs, and only there."""

import numpy as np
import pytest
import torch
from torch import nn

import kinetiq as kq
from kinetiq.inversion import invert
from kinetiq.precision import exact_float32

FLAGS = ("enabled", "benchmark", "deterministic", "allow_tf32")


def flags():
    return {name: getattr(torch.backends.cudnn, name) for name in FLAGS}


@pytest.fixture
def engine(tiny_folder):
    with kq.Engine.load(tiny_folder()) as engine:
        yield engine


@pytest.fixture
def convolutions(monkeypatch):
    """Whether TF32 was allowed at each convolution, forward and backward."""
    seen = []
    forward = nn.Conv2d.forward

    def look(self, given):
        seen.append(torch.backends.cudnn.allow_tf32)
        out = forward(self, given)
        if out.requires_grad:
            out.register_hook(lambda _: seen.append(torch.backends.cudnn.allow_tf32))
        return out

    monkeypatch.setattr(nn.Conv2d, "forward", look)
    return seen


def moving() -> kq.Clip:
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    frames[range(4), :, range(4)] = 255
    return kq.Clip.from_array(frames)


def test_flags_are_as_they_were_behind_the_block():
    before = flags()
    assert before["allow_tf32"]
    with exact_float32():
        assert flags() == before | {"allow_tf32": False}
    assert flags() == before
    with pytest.raises(RuntimeError), exact_float32():
        raise RuntimeError
    assert flags() == before


def test_what_a_user_chose_stays_within_the_block():
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True):
        before = flags()
        with exact_float32():
            assert flags() == before | {"allow_tf32": False}
        assert flags() == before


def test_the_precision_of_matrix_products_is_the_users():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with exact_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    "control",
    [None, lambda: kq.QueryInjection(moving()), lambda: kq.MoftGuidance(moving(), window=(0, 1))],
    ids=["plain", "query", "moft"],
)
def test_every_convolution_of_a_clip_is_exact(engine, convolutions, control):
    controls = None if control is None else control()
    engine.generate("a ring", controls, steps=2, frames=4, height=16, width=16)
    assert len(convolutions) > 10
    assert not any(convolutions)
    assert torch.backends.cudnn.allow_tf32


def test_every_convolution_of_an_inversion_is_exact(engine, convolutions):
    invert(engine.checkpoint, engine.denoiser, engine.encode(moving()), steps=2)
    assert len(convolutions) > 10
    assert not any(convolutions)


def test_frames_are_rounded_as_clips_round_arrays(engine):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pixels = engine._pixels(latents).numpy()
    expected = kq.Clip.from_array(pixels, 8.0)
    assert len(np.unique(expected.frames)) > 100
    np.testing.assert_array_equal(engine.decode(latents, 8.0).frames, expected.frames)
