"""Boards of shots: what is asked, what it becomes, and what runs."""

import numpy as np
import pytest
import torch

import kinetiq as kq
from kinetiq import attention, board_run
from kinetiq import engine as engine_module
from kinetiq.control_tensors import ControlTensors
from kinetiq.errors import CheckpointError, NonFiniteError, RequestError, WorkError
from kinetiq.shots import PAPER, has_words

TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32
PROMPTS = ("a ring moving left", "a ring on a dark red background", "a ring and a cross")
SIZE = {"frames": 5, "height": 16, "width": 16}


def board(prompts=PROMPTS, steps=4, seed=3, controls=None, **options):
    controls = controls or {}
    shots = [kq.Shot(prompt, controls.get(n)) for n, prompt in enumerate(prompts)]
    return kq.ConsistentShots(
        "a ring", shots, steps=steps, seed=seed, **SIZE, **(EVERY_PART | options)
    )


EVERY_PART = {"preserve_until": 0.25, "flow": True, "refine": 0.8}
WHOLE = {"keys_window": (0.0, 1.0), "refine_window": (0.25, 1.0), "key_frames": 2}
PLAIN = {"keys_window": (0.0, 0.0), "refine": 0.0, "flow": False}


def latents(engine, asked, **options):
    """What each request becomes before it is decoded, boards as one tensor of their shots."""
    done = dict(engine._sample(asked, options.get("max_clips", 64), lambda *_: None))
    found = []
    for index in range(len(asked)):
        result = done[index][0]
        if isinstance(result, Exception):
            found.append(result)
        else:
            found.append(
                result if isinstance(result, torch.Tensor) else torch.stack(result.latents)
            )
    return found


def distance(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


# ---- what is asked


@pytest.mark.parametrize(
    ("text", "words", "there"),
    [
        ("a ring", "a ring", True),
        ("look: A  Ring, moving", "a ring", True),
        ("a rings", "a ring", False),
        ("extra ring", "a ring", False),
        ("ring a", "a ring", False),
        ("a (red) ring?", "(red) ring", True),
    ],
)
def test_words_of_a_subject(text, words, there):
    assert has_words(text, words) is there


def test_shots_become_requests_of_their_own():
    clip = kq.Clip.from_array(np.zeros((4, 16, 16, 3), np.uint8))
    control = kq.QueryInjection(clip)
    shots = [kq.Shot("a ring"), kq.Shot("a ring up", control, seed=9, negative_prompt="a cross")]
    asked = kq.ConsistentShots("ring", shots, seed=5, steps=7, guidance_scale=2.0, eta=0.5)
    shared = {"steps": 7, "guidance_scale": 2.0, "eta": 0.5}
    assert asked.requests() == (
        kq.Request("a ring", seed=5, **shared),
        kq.Request("a ring up", control, seed=9, negative_prompt="a cross", **shared),
    )


def test_what_was_asked_cannot_change():
    masks = [np.ones((4, 4)), np.ones((4, 4))]
    asked = kq.ConsistentShots("ring", [kq.Shot("a ring"), kq.Shot("the ring")], masks=masks)
    same = kq.ConsistentShots("ring", [kq.Shot("a ring"), kq.Shot("the ring")], masks=masks)
    assert asked == same
    assert hash(asked) == hash(same)
    masks[0][:] = 0
    assert asked.masks[0].all()
    assert asked == same
    assert asked != kq.ConsistentShots("ring", [kq.Shot("a ring"), kq.Shot("the ring")])


def test_a_list_of_controls_is_frozen():
    control = kq.QueryInjection(kq.Clip.from_array(np.zeros((4, 16, 16, 3), np.uint8)))
    given = [control]
    shot = kq.Shot("a ring", given)
    given.clear()
    assert shot.control == (control,)


def test_masks_of_a_board_that_is_done_are_masks_for_another():
    shots = [kq.Shot("a ring"), kq.Shot("the ring")]
    found = np.stack([np.zeros((3, 4, 4), np.float32), np.ones((3, 4, 4), np.float32)])
    for masks in (found, torch.tensor(found)):
        asked = kq.ConsistentShots("ring", shots, masks=masks)
        assert np.array_equal(np.stack(asked.masks), found)


RINGS = [kq.Shot("a ring"), kq.Shot("the ring")]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("shots: must be at least 2, got 1", {"shots": RINGS[:1]}),
        ("shots: must be a list of Shot", {"shots": ["a ring", "a ring"]}),
        ("shots: must be a list of Shot", {"shots": "a ring"}),
        (
            "prompt of shot 2 must hold the subject 'ring' as words, got 'a cross'",
            {"shots": [*RINGS[:1], kq.Shot("a cross")]},
        ),
        ("subject: must hold at least one word", {"subject": " "}),
        ("subject: must be text, got int", {"subject": 3}),
        ("shot 2: seed: must be a whole number", {"shots": [*RINGS[:1], kq.Shot("ring", seed=-1)]}),
        ("shot 1: prompt: must be text", {"shots": [kq.Shot(7), *RINGS]}),
        ("shot 1: steps: must be a whole number", {"steps": 0}),
        ("keys_window: must be two shares", {"keys_window": (0.5, 0.1)}),
        ("keys_window: must be two shares", {"keys_window": 0.5}),
        ("refine_window: must be a number from 0 to 1, got 2", {"refine_window": (0, 2)}),
        ("keys_weight: must be a number above 0", {"keys_weight": 0}),
        ("preserve_until: must be a number", {"preserve_until": 1.5}),
        ("flow: must be True or False, got 1", {"flow": 1}),
        ("key_frames: must be a whole number of frames", {"key_frames": 0}),
        ("flow_weight: must be 'symmetric' or 'paper'", {"flow_weight": "even"}),
        ("refine: must be a number", {"refine": "much"}),
        ("refine_halves: must be 'both' or 'cond'", {"refine_halves": "uncond"}),
        ("query_halves: must be 'both' or 'cond'", {"query_halves": "uncond"}),
        ("mask_dropout: must be a number", {"mask_dropout": -0.1}),
        ("vanilla: must be 'beside' or 'before'", {"vanilla": "after"}),
        ("seed: must be a whole number from 0 to 9223372036854775807, got 'x'", {"seed": "x"}),
        ("masks: must be 'attention', a callable, or a list", {"masks": np.array(1.0)}),
        ("map_at: must be a number", {"map_at": 3}),
        ("masks: must be 'attention', a callable, or a list", {"masks": "clip"}),
        ("masks: must be 'attention', a callable, or a list", {"masks": 5}),
        ("masks: must be one array for each of 2 shots, got 1", {"masks": [np.ones((4, 4))]}),
        ("that of shot 2 must be an array of numbers", {"masks": [np.ones((4, 4)), "all"]}),
        (
            "shot 2: control: must not be MoftGuidance",
            {
                "shots": [
                    *RINGS[:1],
                    kq.Shot("ring", kq.MoftGuidance(direction="left")),
                ]
            },
        ),
    ],
)
def test_errors_say_what_must_be(words, options):
    asked = {"subject": "ring", "shots": RINGS} | options
    with pytest.raises(RequestError, match=words.replace("(", r"\(")):
        kq.ConsistentShots(asked.pop("subject"), asked.pop("shots"), **asked)


# ---- what it becomes


def test_by_default_shots_see_each_other_and_nothing_else(engine):
    asked = kq.ConsistentShots("a ring", [kq.Shot(prompt) for prompt in PROMPTS], steps=20, **SIZE)
    resolved = engine.resolve_shots(asked)
    assert resolved.keys == (0, 20)
    assert (resolved.refined, resolved.preserved, resolved.key_frames) == ((0, 0), 0, None)
    assert resolved.guided_until == 0


def test_windows_of_the_paper_in_steps(engine):
    """t in [550, 950], [590, 950] and down to 750 of 1000 at 20 steps, t = 1000 (1 - step / 20)."""
    resolved = engine.resolve_shots(board(steps=20, **PAPER))
    assert resolved.keys == (1, 9)
    assert resolved.refined == (1, 8)
    assert resolved.preserved == 5
    assert resolved.key_frames.before.tolist() == [0, 0, 0, 0, 4]
    assert resolved.guided_until == 20  # flow reads the shots left alone to the end
    assert resolved.map_step is None
    assert engine.resolve_shots(board(steps=20, vanilla="before")).map_step == 15


@pytest.mark.parametrize(
    ("options", "until"),
    [
        ({"flow": False}, 7),  # matches of step 7 are of the features of step 6
        ({"flow": False, "refine": 0.0}, 5),  # masks then come from the shots themselves
        ({"flow": False, "preserve_until": 0.0, "refine_window": (0.0, 0.0)}, 0),
        ({"key_frames": 1}, 7),
        ({"vanilla": "before"}, 5),
        ({"vanilla": "before", "preserve_until": 0.0}, 0),
    ],
)
def test_shots_left_alone_are_dropped_after_their_last_reader(engine, options, until):
    assert engine.resolve_shots(board(steps=20, **options)).guided_until == until


def test_nothing_is_looked_at_before_where_nothing_needs_it(engine):
    resolved = engine.resolve_shots(board(vanilla="before", **PLAIN))
    assert resolved.map_step is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"masks": [np.ones((7, 4, 4))] * 3}, "masks: that of shot 1 must be .*frames = 5"),
        ({"sampler": "none"}, "shots: shot 1: sampler"),
        (
            {"prompts": ("a ring", "a red cross " * 40 + "a ring")},
            "shots: shot 2: prompt: .* must hold",
        ),
    ],
)
def test_what_only_a_model_can_tell_is_named_too(engine, options, words):
    with pytest.raises(RequestError, match=words):
        engine.generate_shots(board(**options))


def test_an_error_of_a_shot_keeps_its_kind_and_names_the_shot(engine, monkeypatch):
    resolve = engine.resolve

    def refuse(request, *given):
        if request.prompt == PROMPTS[1]:
            raise CheckpointError("motion: it must be of this family")
        return resolve(request, *given)

    monkeypatch.setattr(engine, "resolve", refuse)
    with pytest.raises(CheckpointError, match=r"^shots: shot 2: motion: it must be"):
        engine.generate_shots(board())


def test_a_network_without_the_features_that_are_matched_is_said_at_once(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "DEFAULT_TAP", "up_blocks.9")
    with pytest.raises(RequestError, match=r"^refine: must be left out here.*up_blocks"):
        engine.resolve_shots(board())
    engine.resolve_shots(board(refine=0.0))


def test_what_becomes_no_clip_is_refused_where_clips_come(engine):
    request = kq.Request("a ring", steps=1, **SIZE)
    with pytest.raises(RequestError, match="must be a Request here, got ConsistentShots"):
        next(engine.generate_latents([board()]))
    with pytest.raises(RequestError, match="must be a ConsistentShots here, got Request"):
        next(engine.generate_storyboards([request]))


# ---- what runs


SEEING = {"keys_window": (0.0, 1.0), "refine": 0.0, "flow": False, "masks": [np.ones((4, 4))] * 3}


def test_preserved_queries_are_those_of_the_shots_left_alone(engine, reference, monkeypatch):
    """At all spatial sites, whatever is injected into a shot, though keys make shots differ."""
    seen = []
    attend = attention._attend

    def note(query, key, value, heads, row, blend, shared):
        used = query if row is None else attention.choose_queries(query, row, blend)
        seen.append((used[:6], used[6:12]))  # of the shots, and of the same left alone
        return attend(query, key, value, heads, row, blend, shared)

    monkeypatch.setattr(attention, "_attend", note)
    controls = {
        0: kq.QueryInjection(reference, until=0.5, alpha=0.7, region=np.eye(8)),
        1: kq.QueryInjection(reference, sites="temporal"),
        2: kq.QueryInjection(reference, until=0.5, reduce_leak=True),
    }
    asked = board(controls=controls, steps=2, **(SEEING | {"preserve_until": 1.0}))
    (got,) = latents(engine, [asked])
    assert len(seen) > 2
    assert all(distance(own, alone) <= 1e-5 for own, alone in seen)
    plain = torch.stack(list(engine.generate_latents(asked.requests())))
    assert distance(got, plain) > 10 * TOLERANCE


def test_nothing_asked_is_plain_generation(engine):
    asked = board(preserve_until=0.0, **PLAIN)
    (got,) = latents(engine, [asked])
    wanted = torch.stack(list(engine.generate_latents(asked.requests())))
    assert distance(got, wanted) <= TOLERANCE


def test_flow_between_all_frames_changes_nothing(engine):
    """With every frame a key frame, as with flow off."""
    options = {"preserve_until": 0.5, "keys_window": (0.0, 1.0), "refine": 0.0}
    every = latents(engine, [board(key_frames=1, flow=True, **options)])[0]
    none = latents(engine, [board(flow=False, **options)])[0]
    some = latents(engine, [board(key_frames=4, **options)])[0]
    assert distance(every, none) <= TOLERANCE
    assert distance(some, none) > 10 * TOLERANCE


def test_masks_of_zeros_share_no_keys(engine):
    options = {"preserve_until": 0.0, "flow": False, "refine": 0.0, "keys_window": (0.0, 1.0)}
    zeros = latents(engine, [board(masks=[np.zeros((4, 4))] * 3, **options)])[0]
    ones = latents(engine, [board(masks=[np.ones((4, 4))] * 3, **options)])[0]
    plain = latents(engine, [board(**(options | {"keys_window": (0, 0)}))])[0]
    assert distance(zeros, plain) <= TOLERANCE
    assert distance(ones, plain) > 10 * TOLERANCE


@pytest.mark.parametrize("vanilla", ["beside", "before"])
def test_each_part_changes_what_is_made(engine, vanilla):
    """So that the tests of equality around here have something to find."""
    options = {"vanilla": vanilla, **WHOLE}
    whole = latents(engine, [board(**options)])[0]
    for less in (
        {"keys_window": (0, 0)},
        {"refine": 0.0},
        {"flow": False},
        {"preserve_until": 0.0},
        {"query_halves": "cond"},
        {"refine_halves": "cond"},
        {"mask_dropout": 0.5},
        {"keys_weight": 3.0},
        {"flow_weight": "paper"},
    ):
        assert distance(latents(engine, [board(**(options | less))])[0], whole) > TOLERANCE, less


def neighbours_of(asked, reference):
    return [
        kq.Request("a red circle", kq.QueryInjection(reference), seed=7, steps=4, **SIZE),
        asked,
        kq.Request("a cross", seed=8, steps=2, guidance_scale=1.0, **SIZE),
        board(PROMPTS[:2], steps=3, seed=40, guidance_scale=1.0, key_frames=4),
    ]


def test_neighbours_do_not_change_a_board(engine, reference):
    masks = [np.eye(8), np.ones((8, 8)), np.eye(8)[::-1]]
    smooth = {"flow": False, "refine": 0.0, "keys_window": (0.0, 1.0), "preserve_until": 0.5}
    asked = board(masks=masks, mask_dropout=0.2, steps=3, **smooth)
    together = latents(engine, neighbours_of(asked, reference))
    assert distance(together[1], latents(engine, [asked])[0]) <= TOLERANCE


@pytest.mark.parametrize("vanilla", ["beside", "before"])
def test_neighbours_do_not_change_what_a_board_chooses(engine, reference, vanilla):
    """Masks and matches are chosen by comparing numbers, and rounding may break near ties.

    In float64 it does not, so what is left is whether rows see what they should not.
    """
    engine.denoiser.detach()
    engine.checkpoint.unet.double()
    engine.checkpoint.vae.double()
    engine.denoiser.attach()
    asked = neighbours_of(board(vanilla=vanilla, steps=3, **WHOLE), reference)
    together = latents(engine, asked)
    for index, request in enumerate(asked):
        assert distance(together[index], latents(engine, [request])[0]) <= 1e-6, index


def test_the_same_board_gives_the_same_bits(engine):
    once, again = (latents(engine, [board(mask_dropout=0.3, **WHOLE)])[0] for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m"])
def test_shots_left_alone_are_plain_generation(engine, fragile, sampler):
    """With the noise and the memory of a sampler, whatever the shots beside them do."""
    denoiser = fragile()
    asked = board(sampler=sampler, steps=3, **(SEEING | {"preserve_until": 1.0}))
    latents(engine, [asked])
    beside = list(denoiser.latents)
    denoiser.latents.clear()
    list(engine.generate_latents(asked.requests()))
    for both, plain in zip(beside, denoiser.latents, strict=True):
        assert distance(both[6:], plain) <= TOLERANCE
    assert distance(both[:6], plain) > 10 * TOLERANCE


def test_a_control_acts_on_a_shot(engine, reference):
    controls = {
        0: kq.QueryInjection(reference, until=0.5, alpha=0.7),
        1: kq.MotionInjection(reference, until=0.5),
    }
    whole = latents(engine, [board(controls=controls, **WHOLE)])[0]
    without = latents(engine, [board(**WHOLE)])[0]
    for shot in (0, 1):
        assert distance(whole[shot], without[shot]) > 10 * TOLERANCE


def test_masks_by_a_callable_see_the_clean_frames_of_the_shots_left_alone(engine):
    seen = []

    def find(frames):
        seen.append(frames)
        return [np.eye(8), np.ones((5, 4, 4)), np.zeros((16, 16))]

    options = {"keys_window": (0.0, 0.75), "refine": 0.0}
    found = next(engine.generate_storyboards([board(masks=find, **options)]))
    assert [len(frames) for frames in seen] == [3, 3]  # at the second step and the third
    assert all(clip.shape == (5, 16, 16, 3) for frames in seen for clip in frames)
    assert all(clip.min() >= 0 and clip.max() <= 1 for frames in seen for clip in frames)
    assert found.masks[0, 3].tolist() == np.eye(8).tolist()
    assert found.masks[1].min() == 1
    assert found.masks[2].max() == 0
    seen.clear()
    next(engine.generate_storyboards([board(masks=find, vanilla="before", **options)]))
    assert len(seen) == 1


def test_a_callable_that_returns_no_masks_fails_its_board_alone(engine):
    broken = board(masks=lambda _: [np.ones((4, 4))])
    fine = board(PROMPTS[:2], seed=40)
    first, second = engine.generate_storyboards([broken, fine], on_error="return", max_clips=32)
    assert "masks: must be one array for each of 3 shots, got 1" in str(first)
    assert isinstance(second, kq.ShotBoard)


def test_boards_come_back_with_their_masks(engine):
    found = next(engine.generate_storyboards([board()]))
    assert [type(clip) for clip in found.clips] == [kq.Clip] * 3
    assert found.clips[0].frames.shape == (5, 16, 16, 3)
    assert found.masks.shape == (3, 5, 8, 8)
    assert set(np.unique(found.masks)) == {0.0, 1.0}
    assert next(engine.generate_storyboards([board(preserve_until=0.0, **PLAIN)])).masks is None


def test_generate_shots_is_a_board_of_one(engine):
    clips = engine.generate_shots(board())
    board_clips = next(engine.generate_storyboards([board()])).clips
    assert isinstance(clips, list)
    for one, other in zip(clips, board_clips, strict=True):
        assert np.array_equal(one.frames, other.frames)


def test_boards_and_requests_come_back_in_their_order(engine):
    asked = [kq.Request("a cross", steps=2, **SIZE), board(), kq.Request("a ring", steps=1, **SIZE)]
    first, second, third = engine.generate_many(asked)
    assert isinstance(first, kq.Clip)
    assert isinstance(second, kq.ShotBoard)
    assert isinstance(third, kq.Clip)


@pytest.mark.parametrize("vanilla", ["beside", "before"])
def test_progress_counts_the_steps_of_shots(engine, vanilla):
    seen = []
    note = lambda *event: seen.append(event)
    list(engine.generate_storyboards([board(vanilla=vanilla)], progress=note))
    steps = [event[1:] for event in seen if event[0] == "denoising"]
    total = 3 * (4 if vanilla == "beside" else 4 + 3 + 1)
    assert steps[-1] == (total, total)
    assert steps == sorted(steps)


class Fragile:
    """A denoiser that runs out of memory above some rows, or answers NaN to some rows."""

    def __init__(self, inner, rows=1000, poison=None):
        self.inner, self.rows, self.poison = inner, rows, poison
        self.seen = []
        self.given = []
        self.latents = []
        self.watched = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def watching(self, rows, words, tap):
        self.watched.append((bool(words.shape[1]), bool(tap)))
        return self.inner.watching(rows, words, tap)

    def predict(self, latents, timesteps, text, controls):
        self.seen.append(len(latents))
        self.latents.append(latents)
        self.given.append(controls)
        if len(latents) > self.rows:
            raise torch.OutOfMemoryError("out of memory")
        out = self.inner.predict(latents, timesteps, text, controls).clone()
        if self.poison is not None:
            out[self.poison : self.poison + 1] = float("nan")
        return out


@pytest.fixture
def fragile(engine):
    """Makes the engine's denoiser fragile, and lets it be itself again."""
    kept = engine.denoiser

    def make(**options):
        engine.denoiser = Fragile(kept, **options)
        return engine.denoiser

    yield make
    engine.denoiser = kept


def test_shots_left_alone_run_no_longer_than_they_are_read(engine, fragile):
    denoiser = fragile()
    options = {"steps": 4, "flow": False, "keys_window": (0.0, 0.75), "refine": 0.0}
    list(engine.generate_storyboards([board(preserve_until=0.25, **options)]))
    assert denoiser.seen == [12, 6, 6, 6]
    denoiser.seen.clear()
    list(engine.generate_storyboards([board(preserve_until=0.25, vanilla="before", **options)]))
    assert denoiser.seen == [6, 6, 6, 6, 12, 6, 6, 6]


def test_running_out_of_memory_never_splits_a_board(engine, fragile):
    options = {"masks": [np.eye(8)] * 2, "steps": 3, "flow": False, "refine": 0.0}
    options |= {"keys_window": (0.0, 1.0), "preserve_until": 1.0}
    asked = [
        board(PROMPTS[:2], seed=1, **options),
        kq.Request("a cross", seed=2, steps=3, **SIZE),
        board(PROMPTS[1:], seed=4, **options),
    ]
    whole = latents(engine, asked)
    denoiser = fragile(rows=9)
    split = latents(engine, asked)
    assert denoiser.seen[0] == 18  # two boards of two shots, with those left alone; a clip
    assert set(denoiser.seen[1:]) <= {8, 2, 10}  # boards and the clip; a part that was too large
    assert denoiser.seen.count(10) <= 1
    for got, wanted in zip(split, whole, strict=True):
        assert distance(got, wanted) <= TOLERANCE


def test_a_board_too_large_for_the_memory_says_so_and_the_rest_goes_on(engine, fragile):
    fragile(rows=6)
    asked = [board(), kq.Request("a cross", steps=2, **SIZE)]
    large, clip = engine.generate_many(asked, on_error="return", max_clips=32)
    assert isinstance(large, WorkError)
    assert "the 3 shots of one board, 6 clips of 5 frames of 8x8 latents" in str(large)
    assert "ask for fewer shots" in str(large)
    assert isinstance(clip, kq.Clip)


@pytest.mark.parametrize(
    ("name", "options"),
    [("patches_at_levels", {}), ("flow_at_levels", {"vanilla": "before"})],
)
def test_matching_that_does_not_fit_fails_its_board_alone(engine, monkeypatch, name, options):
    def run_out(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(board_run, name, run_out)
    asked = [board(steps=2, **(WHOLE | options)), kq.Request("a cross", steps=2, **SIZE)]
    large, clip = engine.generate_many(asked, on_error="return", max_clips=32)
    assert isinstance(large, WorkError)
    assert "the 3 shots of one board" in str(large)
    assert isinstance(clip, kq.Clip)


def test_only_what_is_read_is_watched(engine, fragile):
    denoiser = fragile()
    plain = {"flow": False, "refine": 0.0, "preserve_until": 0.0, "keys_window": (0.0, 1.0)}
    ones = [np.ones((4, 4))] * 3
    refined = {"refine": 0.8, "refine_window": (0.0, 1.0)}
    for options, watched in (
        (plain, [(True, False)] * 2),
        (plain | {"masks": ones}, []),
        (plain | {"masks": lambda _: ones}, []),
        (plain | refined | {"masks": ones}, [(False, True)] * 2),
        (plain | refined, [(True, True)] * 2),
        (plain | {"vanilla": "before", "map_at": 0.4}, [(True, False)] * 2),
        (
            plain | {"vanilla": "before", "map_at": 0.4, "flow": True, "key_frames": 2},
            [(True, False), (True, True)],
        ),
    ):
        denoiser.watched.clear()
        latents(engine, [board(steps=3, **options)])
        assert denoiser.watched == watched, options


def test_a_shot_that_is_not_finite_fails_its_board_and_is_named(engine, fragile):
    fragile(poison=4)  # the conditional row of the third shot
    asked = [board(), kq.Request("a cross", steps=2, **SIZE)]
    broken, clip = engine.generate_many(asked, on_error="return", max_clips=32)
    assert isinstance(broken, NonFiniteError)
    assert "at step 1 of 4 of shot 3 of request 0 ('a ring and a cross')" in str(broken)
    assert isinstance(clip, kq.Clip)


def test_a_board_waits_for_clips_of_its_shape_and_for_room(engine, fragile):
    denoiser = fragile()
    asked = [kq.Request("a cross", steps=2, **SIZE), board(steps=1)]
    assert len(list(engine.generate_many(asked, max_clips=4))) == 2
    assert denoiser.seen == [2, 2, 12]


def test_plain_requests_carry_no_control_of_boards(engine, fragile):
    denoiser = fragile()
    list(engine.generate_latents([kq.Request("a cross", steps=2, **SIZE)]))
    assert denoiser.given == [ControlTensors()] * 2
