"""Float32 on a GPU is float32: cuDNN's TF32 is off where a network or a VAE runs, and only there."""

import subprocess
import sys

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


def test_it_is_as_it_was_behind_the_block():
    before = flags()
    assert before["allow_tf32"]
    with exact_float32():
        assert flags() == before | {"allow_tf32": False}
        with exact_float32():
            assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
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


def test_blocks_of_several_threads_may_overlap():
    first, second = exact_float32(), exact_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cudnn.allow_tf32
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32


STATES = """
import multiprocessing, sys, warnings
import torch
from torch.backends import cudnn
from kinetiq.precision import exact_float32

warnings.simplefilter("ignore")  # that there are two ways

SETTINGS = {
    "default": lambda: None,
    "older, off": lambda: setattr(cudnn, "allow_tf32", False),
    "older, on": lambda: setattr(cudnn, "allow_tf32", True),
} | {
    f"{name} {value}": lambda place=place, value=value: setattr(place, "fp32_precision", value)
    for name, place in {
        "all": torch.backends,
        "cudnn": cudnn,
        "convolutions": cudnn.conv,
        "products": torch.backends.cuda.matmul,
    }.items()
    for value in ("ieee", "tf32")
}

def state():
    places = (torch.backends, cudnn, cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    said = [place.fp32_precision for place in places]
    try:
        return [*said, cudnn.allow_tf32]
    except RuntimeError:
        return [*said, "refused"]

def check(name):
    SETTINGS[name]()
    before = state()
    for _ in range(2):
        with exact_float32(), exact_float32():
            inside = state()
            assert cudnn.conv.fp32_precision != "tf32", (name, inside)
            assert inside[0] == before[0] and inside[4] == before[4], (name, before, inside)
        assert state() == before, (name, before, state())

if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    for name in SETTINGS:
        process = fork.Process(target=check, args=(name,))
        process.start()
        process.join()
        assert process.exitcode == 0, name
    print(len(SETTINGS))
"""


def test_whatever_a_user_has_said_of_float32_is_kept(tmp_path):
    """In either of the two ways that PyTorch has for it, each in a process of its own."""
    (tmp_path / "states.py").write_text(STATES)
    done = subprocess.run(
        [sys.executable, "-P", str(tmp_path / "states.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "11\n"), done.stderr


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
