"""What a request may say, in which words it is refused, and what it resolves to."""

import math
import re

import attrs
import numpy as np
import pytest

import kinetiq as kq


@pytest.fixture(scope="module")
def engine(tiny_folder):
    with kq.Engine.load(tiny_folder()) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference():
    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    return kq.Clip.from_array(frames)


WHOLE = [("seed", 0, 2**63 - 1), ("steps", 1, 1000), ("frames", 1, 1024)]
WHOLE += [("height", 8, 4096), ("width", 8, 4096)]
NUMBERS = [("guidance_scale", 1, 100), ("fps", 0.1, 240), ("eta", 0, 1)]


@pytest.mark.parametrize(("name", "low", "high"), WHOLE)
def test_whole_numbers(name, low, high):
    for value in (low, high):
        assert getattr(kq.Request("a ring", **{name: value}), name) == value
    for value in (low - 1, high + 1, float(low), str(low), True, math.nan):
        message = f"{name}: must be a whole number from {low} to {high}, got {value!r}"
        with pytest.raises(kq.RequestError, match=f"^{re.escape(message)}$"):
            kq.Request("a ring", **{name: value})


@pytest.mark.parametrize(("name", "low", "high"), NUMBERS)
def test_numbers(name, low, high):
    for value in (low, high, (low + high) / 2):
        assert getattr(kq.Request("a ring", **{name: value}), name) == value
    for value in (low - 0.01, high + 0.01, math.nan, math.inf, str(low), True, [low]):
        message = f"{name}: must be a number from {low:g} to {high:g}, got {value!r}"
        with pytest.raises(kq.RequestError, match=f"^{re.escape(message)}$"):
            kq.Request("a ring", **{name: value})


@pytest.mark.parametrize("name", ["seed", "eta"])
def test_what_has_a_default_may_not_be_none(name):
    with pytest.raises(kq.RequestError, match=f"^{name}: must be .*, got None$"):
        kq.Request("a ring", **{name: None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt: must hold at least one word, got an empty one"),
        ({"prompt": " \n\t"}, "prompt: must hold at least one word, got an empty one"),
        ({"prompt": None}, "prompt: must be text, got NoneType"),
        ({"prompt": ["a ring"]}, "prompt: must be text, got list"),
        ({"prompt": "a \ud800 ring"}, r"prompt: must be valid Unicode, got 'a \ud800 ring'"),
        ({"negative_prompt": 3}, "negative_prompt: must be text, got int"),
    ],
)
def test_words(options, message):
    with pytest.raises(kq.RequestError, match=f"^{re.escape(message)}$"):
        kq.Request(**({"prompt": "a ring"} | options))


def test_says_nothing_that_was_not_said():
    request = kq.Request("a ring")
    said = attrs.asdict(request, recurse=False)
    assert said.pop("prompt") == "a ring"
    assert said == {
        "control": (),
        "seed": 0,
        "negative_prompt": "",
        "steps": None,
        "guidance_scale": None,
        "frames": None,
        "height": None,
        "width": None,
        "fps": None,
        "sampler": None,
        "eta": 0.0,
    }
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        request.seed = 1


def test_one_control_or_several(reference):
    control = kq.QueryInjection(reference)
    assert kq.Request("a ring", control).control == (control,)
    assert kq.Request("a ring", [control]).control == (control,)
    assert kq.Request("a ring", []).control == ()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("guidance", "; did you mean 'guidance_scale'?"),
        ("step", "; did you mean 'steps'?"),
        ("zebra", ""),
        ("prompt", ""),  # it is given beside the options
    ],
)
def test_an_unknown_option_is_named_with_what_is_near(name, hint):
    known = (
        "control, seed, negative_prompt, steps, guidance_scale, frames, height, width, fps, "
        "sampler, eta"
    )
    message = f"request: options must be among {known}, got {name!r}{hint}"
    with pytest.raises(kq.RequestError, match=f"^{re.escape(message)}$"):
        kq.Request.from_options("a ring", {name: 1})


def test_known_options_are_what_the_constructor_makes_of_them():
    options = {"seed": 3, "steps": 7, "fps": 12}
    assert kq.Request.from_options("a ring", options) == kq.Request("a ring", **options)


def test_resolving_fills_in_the_defaults(engine):
    resolved = engine.resolve(kq.Request("a ring"))
    assert resolved.frames == engine.family.frames == 16
    assert (resolved.latent_height, resolved.latent_width) == (8, 8)
    assert resolved.shape == (16, 8, 8)
    assert resolved.sampler.steps == engine.family.steps == 25
    assert resolved.guidance_scale == engine.family.guidance_scale == 7.5
    assert resolved.fps == engine.family.fps == 8.0
    assert resolved.guided
    assert (resolved.controls.query, resolved.controls.motion) == (None, None)
    assert None not in attrs.asdict(resolved, recurse=False).values()


def test_resolving_keeps_what_was_said(engine):
    asked = kq.Request(
        "a ring",
        seed=3,
        negative_prompt="a cross",
        steps=4,
        guidance_scale=1,
        frames=5,
        height=24,
        width=10,
        fps=12.5,
        sampler="euler",
    )
    resolved = engine.resolve(asked)
    assert resolved.shape == (5, 12, 5)
    assert (resolved.prompt, resolved.negative_prompt, resolved.seed) == ("a ring", "a cross", 3)
    assert (resolved.sampler.steps, resolved.fps) == (4, 12.5)
    assert not resolved.guided  # a guidance scale of 1 halves the work


def test_controls_become_data_at_the_clips_size(engine, reference):
    controls = [kq.QueryInjection(reference, until=0.5), kq.MotionInjection(reference)]
    request = kq.Request("a ring", controls, frames=4, height=8, steps=5)
    resolved = engine.resolve(request).controls
    assert resolved.query.source.latents.shape == (4, 4, 4, 8)
    assert resolved.query.source.key == resolved.motion.source.key
    assert (resolved.query.steps, resolved.motion.steps) == (2, 5)
    assert resolved.active(1).query is resolved.query
    assert resolved.active(2).query is None
    assert resolved.active(2).motion is resolved.motion


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 15}, "height: must be a multiple of 2 for model, got 15"),
        ({"width": 4095}, "width: must be a multiple of 2 for model, got 4095"),
        ({"frames": 33}, "frames: must be at most 32, the positions that model knows, got 33"),
        ({"sampler": "eulr"}, "sampler: must be one of .*, got 'eulr'"),
        ({"sampler": 3}, "sampler: must be one of .*, got 3"),
        ({"eta": 0.5, "sampler": "euler"}, "sampler: .*eta"),
    ],
)
def test_resolving_says_what_is_wrong(engine, options, message):
    with pytest.raises(kq.RequestError, match=f"^{message}"):
        engine.resolve(kq.Request("a ring", **options))


def test_a_single_frame_holds_no_motion(engine, reference):
    message = "frames: must be at least 2 where a reference gives the motion, got 1"
    with pytest.raises(kq.RequestError, match=f"^{message}$"):
        engine.resolve(kq.Request("a ring", kq.MotionInjection(reference), frames=1))
    assert engine.resolve(kq.Request("a ring", frames=1)).frames == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_prompt": 3}, "source_prompt: must be text, got int"),
        ({"source_prompt": "\ud800"}, "source_prompt: must be valid Unicode"),
        ({"source_seed": "x"}, "source_seed: must be None or a whole number from 0 to .*, got 'x'"),
        ({"source_seed": -1}, "source_seed: must be None or a whole number from 0 to .*, got -1"),
        ({"sites": 3}, "sites: must be a word or a list of site names, got 3"),
        ({"sites": []}, r"sites: must be a word or a list of site names, got \[\]"),
        ({"sites": [3]}, r"sites: must be a word or a list of site names, got \[3\]"),
    ],
)
@pytest.mark.parametrize("control", [kq.QueryInjection, kq.MotionInjection])
def test_says_what_is_wrong_with_a_control(reference, control, options, message):
    with pytest.raises(kq.RequestError, match=f"^{message}"):
        control(reference, **options)


@pytest.mark.parametrize("region", ["left", [[1, 2], [3]], object()])
def test_a_region_that_is_no_array_is_refused(reference, region):
    with pytest.raises(kq.RequestError, match=r"^region: must be an array of numbers, got "):
        kq.MotionInjection(reference, region=region)
