"""Loading, defaults, references in and clips out, and the words for what is wrong."""

import json
import re
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kinetiq as kq
from kinetiq import profiling
from kinetiq.attention import TemporalTransformer
from kinetiq.engine import read_defaults
from kinetiq.families import ANIMATEDIFF, UNET3D


@pytest.fixture(scope="module")
def engine(tiny_folder):
    with kq.Engine.load(tiny_folder()) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def clip():
    frames = np.random.default_rng(0).integers(0, 255, (18, 16, 12, 3), dtype=np.uint8)
    return kq.Clip.from_array(frames, 5.0)


def checkpoint(path=None, sample_size=64):
    return SimpleNamespace(
        path=path, unet=SimpleNamespace(config=SimpleNamespace(sample_size=sample_size))
    )


def has_our_modules(network):
    return any(isinstance(module, TemporalTransformer) for module in network.modules())


def test_a_with_block_detaches_at_its_end(tiny_folder):
    engine = kq.Engine.load(str(tiny_folder()))
    network = engine.checkpoint.unet
    with engine as entered:
        assert entered is engine
        assert has_our_modules(network)
    assert not has_our_modules(network)
    engine.close()  # closing twice is closing once


def test_a_with_block_detaches_when_it_fails(tiny_folder):
    engine = kq.Engine.load(tiny_folder())
    with pytest.raises(kq.RequestError), engine:
        engine.generate("")
    assert not has_our_modules(engine.checkpoint.unet)


def test_an_unknown_back_end_is_refused_before_anything_loads():
    with pytest.raises(
        kq.RequestError,
        match=r"^load: backend must be one of eager, compiled, onnxruntime, .*, got 'tensort'$",
    ):
        kq.Engine.load("/no/such/folder", backend="tensort")


@pytest.mark.parametrize("family", [ANIMATEDIFF, UNET3D])
@pytest.mark.parametrize(
    ("sample_size", "size"), [(64, (512, 512)), ((40, 72), (320, 576)), (None, (512, 512))]
)
def test_defaults_are_the_familys_at_the_networks_size(family, sample_size, size):
    defaults = read_defaults(checkpoint(sample_size=sample_size), family, 8)
    assert (defaults.height, defaults.width) == size
    assert (defaults.frames, defaults.steps) == (family.frames, family.steps)
    assert (defaults.guidance_scale, defaults.fps) == (family.guidance_scale, family.fps)


def test_the_checkpoint_may_say_its_own_defaults(tmp_path):
    (tmp_path / "kinetiq.json").write_text(json.dumps({"frames": 8, "guidance_scale": 3}))
    defaults = read_defaults(checkpoint(tmp_path), ANIMATEDIFF, 8)
    assert (defaults.frames, defaults.guidance_scale) == (8, 3)
    assert (defaults.steps, defaults.height) == (25, 512)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{", "must be JSON: "),
        ("\xff", "must be JSON: "),
        ("[]", r"must map frames, height, width, steps, guidance_scale, fps to numbers, got \[\]"),
        ("3", "must map .* to numbers, got 3"),
        ('{"frame": 8}', "must map .* to numbers, got {'frame': 8}"),
        ('{"seed": 8}', "must map .* to numbers, got {'seed': 8}"),
        ('{"frames": null}', "must map .* to numbers, got {'frames': None}"),
        ('{"frames": "8"}', "frames: must be a whole number from 1 to 1024, got '8'"),
        ('{"frames": 8.5}', "frames: must be a whole number from 1 to 1024, got 8.5"),
        ('{"steps": true}', "steps: must be a whole number from 1 to 1000, got True"),
        ('{"fps": NaN}', "fps: must be a number from 0.1 to 240, got nan"),
        ('{"guidance_scale": 0.5}', "guidance_scale: must be a number from 1 to 100, got 0.5"),
    ],
)
def test_says_what_is_wrong_with_the_defaults(tmp_path, said, message):
    path = tmp_path / "kinetiq.json"
    path.write_bytes(said.encode("latin-1"))
    with pytest.raises(kq.CheckpointError, match=f"^load: {re.escape(str(path))}:? {message}"):
        read_defaults(checkpoint(tmp_path), ANIMATEDIFF, 8)


def test_clips_are_encoded_and_decoded_a_few_frames_at_a_time(engine, clip):
    """18 frames are two parts; what comes out is what each frame gives alone."""
    latents = engine.encode(clip)
    assert latents.shape == (4, 18, 8, 6)
    assert latents.dtype == torch.float32
    alone = engine.encode(kq.Clip.from_array(clip.frames[17:]))
    torch.testing.assert_close(latents[:, 17:], alone)
    seen = []
    decoded = engine.decode(latents, 5.0, lambda *event: seen.append(event))
    assert decoded.frames.shape == clip.frames.shape
    assert decoded.fps == 5.0
    assert seen == [("decoding", 1, 2), ("decoding", 2, 2)]
    single = engine.decode(latents[:, 17:], 5.0).frames[0].astype(int)
    assert abs(decoded.frames[17].astype(int) - single).max() <= 1


def test_pixels_that_are_not_finite_are_named(engine):
    latents = torch.zeros(4, 2, 8, 8)
    latents[0, 1] = float("nan")
    with pytest.raises(
        kq.NonFiniteError, match=r"^decode: pixels must be finite, got NaN or infinity"
    ):
        engine.decode(latents, 8.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "on_error: must be 'raise' or 'return', got 'ignore'"),
        ({"max_clips": 0}, "max_clips: must be at least 1, got 0"),
    ],
)
def test_says_what_is_wrong_with_a_run(engine, options, message):
    with pytest.raises(kq.RequestError, match=f"^{message}$"):
        next(engine.generate_many([kq.Request("a ring")], **options))


def test_what_is_no_request_is_refused_and_the_others_go_on(engine):
    requests = ["a ring", kq.Request("a ring", frames=2, steps=1)]
    refused, made = engine.generate_many(requests, on_error="return")
    assert str(refused).startswith("request: must be a Request or ConsistentShots here, got str")
    assert isinstance(made, kq.Clip)


def test_no_requests_are_no_clips(engine):
    assert list(engine.generate_many([])) == []
    assert list(engine.generate_latents([])) == []


def test_requests_are_drawn_as_room_allows(engine):
    drawn = []

    def endless():
        while True:
            drawn.append(len(drawn))
            yield kq.Request("a ring", seed=len(drawn), frames=2, steps=1)

    clips = engine.generate_many(endless(), max_clips=2)
    for _ in range(3):
        next(clips)
    assert len(drawn) <= 6


def test_a_request_may_come_while_others_are_under_way(engine):
    """None stands for none at this moment, and counts for no place."""
    late, steps = kq.Request("a ring", seed=2, frames=2, steps=1), []
    wanted = engine.generate("a ring", seed=2, frames=2, steps=1)

    def requests():
        yield kq.Request("a ring", seed=1, frames=2, steps=4)
        while len(steps) < 2:
            yield None
        yield late
        yield None

    results = engine.generate_as_completed(
        requests(), progress=lambda stage, *_: steps.append(stage) if stage == "denoising" else None
    )
    (place, clip), (other, _) = results
    assert (place, other) == (1, 0)
    assert np.abs(clip.frames.astype(int) - wanted.frames).max() <= 1
    assert len(steps) == 4  # it joined the third


def test_none_is_no_request_where_all_are_known(engine):
    with pytest.raises(kq.RequestError, match="must be a Request or ConsistentShots here, got Non"):
        list(engine.generate_many([None]))


def test_a_reference_is_encoded_once_a_call(engine, clip, monkeypatch):
    encoded = []
    encode = type(engine).encode
    monkeypatch.setattr(type(engine), "encode", lambda *a: encoded.append(1) or encode(*a))
    control = [kq.MotionInjection(clip), kq.QueryInjection(clip)]
    requests = [kq.Request("a ring", control, seed=s, frames=2, steps=1) for s in range(3)]
    list(engine.generate_latents(requests))
    assert encoded == [1]


def test_every_stage_has_its_range_in_the_profiler(engine, clip, monkeypatch):
    opened, closed = [], []

    @contextmanager
    def annotate(name, domain):
        assert domain == "kinetiq"
        opened.append(name)
        yield
        closed.append(name)

    def start_range(name, domain):
        opened.append(name)
        return name

    nvtx = SimpleNamespace(annotate=annotate, start_range=start_range, end_range=closed.append)
    monkeypatch.setattr(profiling, "_nvtx", lambda: nvtx)
    engine.generate("a ring", kq.MotionInjection(clip), frames=2, steps=1)
    assert sorted(opened) == sorted(closed)
    assert set(opened) == {
        "request 0",
        "encode",
        "text",
        "step of 1 clips",
        "rows",
        "network",
        "spatial attention",
        "cross attention",
        "temporal transformer",
        "temporal attention",
        "sampler",
        "decode",
    }
    monkeypatch.setattr(profiling, "_nvtx", lambda: None)
    engine.generate("a ring", frames=2, steps=1)  # without nvtx there are no ranges, and no error
