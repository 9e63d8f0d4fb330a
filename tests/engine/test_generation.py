import numpy as np
import pytest
import torch
from stock import load_stock, stock_latents

import kinetiq as kq
from kinetiq import engine as engine_module
from kinetiq import generation
from kinetiq.generation import in_order

SAMPLERS = [
    ("DDIMScheduler", 0.0),
    ("DDIMScheduler", 1.0),
    ("DDPMScheduler", 0.0),
    ("EulerDiscreteScheduler", 0.0),
    ("DPMSolverMultistepScheduler", 0.0),
    ("LCMScheduler", 0.0),
]
TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32


def assert_equal(got, wanted):
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.fixture(params=["animatediff", "unet3d"])
def engine(tiny_folder, request):
    with kq.Engine.load(tiny_folder(request.param)) as loaded:
        yield loaded


@pytest.fixture
def reference():
    rng = np.random.default_rng(0)
    return kq.Clip.from_array(rng.integers(0, 255, (4, 16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", ["animatediff", "unet3d"])
@pytest.mark.parametrize(("scheduler", "eta"), SAMPLERS)
def test_equals_the_stock_pipeline_without_a_control(tiny_folder, family, scheduler, eta):
    folder = tiny_folder(family, scheduler)
    extra = {"eta": eta} if scheduler == "DDIMScheduler" else {}
    wanted = stock_latents(
        load_stock(folder, family),
        "a red circle",
        seed=5,
        num_frames=3,
        num_inference_steps=4,
        guidance_scale=4.0,
        negative_prompt="a blue ring",
        **extra,
    )
    request = kq.Request(
        "a red circle",
        seed=5,
        frames=3,
        steps=4,
        guidance_scale=4.0,
        negative_prompt="a blue ring",
        eta=eta,
    )
    with kq.Engine.load(folder) as engine:
        assert_equal(next(engine.generate_latents([request])), wanted)


def test_decodes_what_the_stock_pipeline_decodes(tiny_folder):
    folder = tiny_folder()
    pipeline = load_stock(folder, "animatediff")
    options = {"num_frames": 3, "num_inference_steps": 2, "guidance_scale": 2.0}
    generator = torch.Generator().manual_seed(1)
    frames = pipeline("a ring", generator=generator, output_type="np", **options).frames[0]
    with kq.Engine.load(folder) as engine:
        clip = engine.generate("a ring", seed=1, frames=3, steps=2, guidance_scale=2.0)
    difference = np.abs(clip.frames.astype(float) - frames * 255)
    assert difference.max() <= 1.0  # half a level of rounding, and half for the last bits


def test_rows_at_different_steps_equal_the_rows_run_alone(engine, reference):
    requests = [
        kq.Request("a red circle", seed=1, frames=4, steps=5),
        kq.Request("a ring", kq.QueryInjection(reference), seed=2, frames=4, steps=3),
        kq.Request("a cross", seed=3, frames=4, steps=4, guidance_scale=1.0, sampler="euler"),
        kq.Request("a blue square", kq.MotionInjection(reference), seed=4, frames=4, steps=2),
        kq.Request("a dark ring", seed=5, frames=4, steps=4, sampler="dpm++2m"),
        kq.Request(
            "a pink cross",
            [kq.QueryInjection(reference, halves="cond"), kq.MotionInjection(reference)],
            seed=6,
            frames=4,
            steps=3,
            guidance_scale=3.0,
        ),
    ]
    together = list(engine.generate_latents(requests, max_clips=3))
    for request, got in zip(requests, together, strict=True):
        assert_equal(got, next(engine.generate_latents([request])))


def test_neighbours_with_other_switches_do_not_change_a_result(engine, reference):
    """Every kind of control beside every other, with sources of its own."""
    other = reference.mirror()
    left = np.zeros((16, 16))
    left[:, :8] = 1
    controls = [
        [kq.QueryInjection(reference, sites="both"), kq.MotionInjection(other)],
        [kq.QueryInjection(other, sites="both", reduce_leak=True, until=1.0)],
        [kq.QueryInjection(other, sites="temporal", alpha=0.5), kq.MotionInjection(reference)],
        [kq.QueryInjection(reference, reduce_leak=True), kq.MotionInjection(other, region=left)],
        [kq.QueryInjection(other, region=left, halves="cond")],
        [kq.MotionInjection(reference, parts="v", blend=0.3, source_prompt="a ring")],
        [],
    ]
    requests = [
        kq.Request("a ring", control, seed=seed, frames=4, steps=3)
        for seed, control in enumerate(controls)
    ]
    together = list(engine.generate_latents(requests, max_clips=len(requests)))
    for request, got in zip(requests, together, strict=True):
        assert_equal(got, next(engine.generate_latents([request])))


def test_a_closed_engine_refuses_to_ignore_controls(tiny_folder, reference):
    engine = kq.Engine.load(tiny_folder())
    engine.close()
    with pytest.raises(kq.RequestError, match="the denoiser must be attached"):
        engine.generate("a ring", kq.MotionInjection(reference), frames=4, steps=1)


def test_the_same_request_in_the_same_plan_gives_the_same_bits(engine, reference):
    request = kq.Request("a ring", kq.MotionInjection(reference), seed=3, frames=4, steps=3)
    first, second = (next(engine.generate_latents([request])) for _ in range(2))
    assert torch.equal(first, second)


def test_clips_of_several_shapes_come_in_the_order_of_their_requests(engine):
    shapes = [(4, 16, 16), (3, 16, 16), (4, 8, 16), (4, 16, 16)]
    requests = [
        kq.Request("a ring", frames=f, height=h, width=w, steps=2, fps=5.0) for f, h, w in shapes
    ]
    clips = list(engine.generate_many(requests))
    assert [clip.frames.shape[:3] for clip in clips] == shapes
    assert {clip.fps for clip in clips} == {5.0}


def test_a_bad_request_leaves_the_others_alone(engine):
    requests = [
        kq.Request("a ring", frames=3, steps=2),
        kq.Request("a ring", frames=3, steps=2, height=15),
        kq.Request("a ring", frames=3, steps=2, seed=1),
    ]
    results = list(engine.generate_many(requests, on_error="return"))
    assert [type(result) for result in results] == [kq.Clip, kq.RequestError, kq.Clip]
    assert "height: must be a multiple of 2" in str(results[1])
    clips = engine.generate_many(requests)
    assert isinstance(next(clips), kq.Clip)
    with pytest.raises(kq.RequestError, match="height"):
        next(clips)


def test_clips_come_as_they_are_completed_with_their_place(engine):
    slow, quick = (kq.Request("a ring", frames=3, steps=steps) for steps in (4, 1))
    bad = kq.Request("a ring", frames=3, steps=2, height=15)
    results = list(engine.generate_as_completed([slow, quick, bad]))
    assert [place for place, _ in results] == [2, 1, 0]
    assert isinstance(results[0][1], kq.RequestError)
    for request, (_, clip) in ((quick, results[1]), (slow, results[2])):
        (alone,) = engine.generate_many([request])
        assert abs(clip.frames.astype(int) - alone.frames).max() <= 1


class Fragile:
    """A denoiser that runs out of memory above some rows, or answers NaN to one row's latents.

    A clip counts by its frames, of which four are usual.
    Above `most_rows` it must not be asked.
    """

    def __init__(self, inner, rows=100, poison=None, most_rows=None):
        self.inner, self.rows, self.poison, self.most_rows = inner, rows, poison, most_rows
        self.family, self.sites, self.multiple = inner.family, inner.sites, inner.multiple
        self.seen = []

    def predict(self, latents, timesteps, text, controls):
        self.seen.append(len(latents))
        assert self.most_rows is None or len(latents) <= self.most_rows
        if len(latents) * latents.shape[2] > self.rows * 4:
            raise torch.OutOfMemoryError("out of memory")
        out = self.inner.predict(latents, timesteps, text, controls).clone()
        if self.poison is not None:
            out[timesteps < self.poison] = float("nan")
        return out


def test_running_out_of_memory_splits_the_batch(engine, reference):
    control = kq.QueryInjection(reference)
    requests = [kq.Request("a ring", control, seed=s, frames=4, steps=3) for s in range(4)]
    whole = list(engine.generate_latents(requests))
    fragile = Fragile(engine.denoiser, rows=5)
    engine.denoiser, kept = fragile, engine.denoiser
    split = list(engine.generate_latents(requests))
    engine.denoiser = kept
    for got, wanted in zip(split, whole, strict=True):
        assert_equal(got, wanted)
    assert fragile.seen[0] == 9  # four clips and one source
    assert max(fragile.seen[1:]) <= 5


def test_large_clips_that_had_to_be_split_do_not_split_small_ones(engine):
    requests = [kq.Request("a ring", seed=s, frames=6 if s < 2 else 2, steps=2) for s in range(6)]
    fragile = Fragile(engine.denoiser, rows=4)
    engine.denoiser, kept = fragile, engine.denoiser
    clips = list(engine.generate_latents(requests))
    engine.denoiser = kept
    assert [clip.shape[1] for clip in clips] == [6, 6, 2, 2, 2, 2]
    assert fragile.seen == [4, 2, 2, 2, 2, 8, 8]


def test_a_batch_is_whole_again_after_nothing_was_to_do(engine):
    """As in a server, where memory that was short once need not be so for ever."""
    fragile = Fragile(engine.denoiser, rows=4)
    engine.denoiser, kept = fragile, engine.denoiser
    done = []

    def requests():
        for wave in range(2):
            yield from (kq.Request("a ring", seed=s, frames=4, steps=1) for s in range(3))
            while len(done) < 3 * (wave + 1):
                yield None
            fragile.rows = 6
            yield None

    for place, _ in engine.generate_as_completed(requests()):
        done.append(place)
    engine.denoiser = kept
    assert fragile.seen == [6, 4, 2, 6]


@pytest.mark.parametrize("kind", ["text", "noise"])
def test_memory_that_is_short_at_a_start_fails_one_clip(engine, monkeypatch, kind):
    encode, start = engine_module.encode_prompts, generation._start_clip

    def encode_prompts(checkpoint, prompts):
        if kind == "text" and prompts == ["a bad ring"]:
            raise torch.OutOfMemoryError("out of memory")
        return encode(checkpoint, prompts)

    def start_clip(index, request, *rest):
        if kind == "noise" and request.prompt == "a bad ring":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return start(index, request, *rest)

    monkeypatch.setattr(engine_module, "encode_prompts", encode_prompts)
    monkeypatch.setattr(generation, "_start_clip", start_clip)
    prompts = ["a ring", "a bad ring", "a star"]
    requests = [kq.Request(prompt, frames=2, steps=2) for prompt in prompts]
    one, failed, other = engine.generate_many(requests, on_error="return")
    assert isinstance(one, kq.Clip)
    assert isinstance(other, kq.Clip)
    assert isinstance(failed, kq.WorkError)
    assert "must fit in" in str(failed)


def test_a_batch_has_no_more_rows_than_the_network_takes(engine):
    requests = [kq.Request("a ring", seed=s, frames=4, steps=3) for s in range(3)]
    whole = list(engine.generate_latents(requests))
    narrow = Fragile(engine.denoiser, most_rows=4)
    engine.denoiser, kept = narrow, engine.denoiser
    split = list(engine.generate_latents(requests))
    engine.denoiser = kept
    for got, wanted in zip(split, whole, strict=True):
        assert_equal(got, wanted)
    assert narrow.seen == [4, 2] * 3  # six rows: two clips, then one


def test_a_clip_of_more_rows_than_the_network_takes_says_so_and_the_rest_goes_on(engine):
    engine.denoiser, kept = Fragile(engine.denoiser, most_rows=1), engine.denoiser
    requests = [
        kq.Request("a ring", frames=3, steps=2),
        kq.Request("a ring", frames=3, steps=2, guidance_scale=1.0),
    ]
    wide, narrow = engine.generate_many(requests, on_error="return")
    engine.denoiser = kept
    assert isinstance(narrow, kq.Clip)
    assert isinstance(wide, kq.ShapeError)
    assert "request 0 ('a ring') must be at most 1 rows of the network, got 2" in str(wide)


def test_a_clip_too_large_for_the_memory_says_so_and_the_rest_goes_on(engine):
    engine.denoiser, kept = Fragile(engine.denoiser, rows=1), engine.denoiser
    requests = [
        kq.Request("a ring", frames=3, steps=2),
        kq.Request("a ring", frames=3, steps=2, guidance_scale=1.0),
    ]
    seen = []
    results = list(
        engine.generate_many(
            requests, on_error="return", progress=lambda *event: seen.append(event)
        )
    )
    engine.denoiser = kept
    assert "one clip of 3 frames of 8x8 latents must fit" in str(results[0])
    assert isinstance(results[1], kq.Clip)
    assert all(done <= total for stage, done, total in seen)


class Narrow:
    """A denoiser that takes no queries and few frames, as an engine may be built."""

    most_rows = None
    multiple = 1

    def __init__(self, inner):
        self.inner, self.family, self.sites = inner, inner.family, inner.sites
        self.taken = []

    def predict(self, latents, timesteps, text, controls):
        if controls.query is not None:
            raise kq.RequestError("the control query")
        if latents.shape[2] > 4:
            raise kq.ShapeError("latents")
        self.taken.append(len(latents))
        return self.inner.predict(latents, timesteps, text, controls)


def test_clips_that_the_network_refuses_fail_alone(engine, reference):
    queries = {1: kq.QueryInjection(reference), 3: kq.QueryInjection(reference)}
    requests = [
        kq.Request("a ring", queries.get(seed, ()), seed=seed, frames=4, steps=3)
        for seed in range(5)
    ]
    whole = [clip.frames.astype(int) for clip in engine.generate_many(requests)]
    engine.denoiser, kept = Narrow(engine.denoiser), engine.denoiser
    results = list(engine.generate_many(requests, on_error="return"))
    narrow, engine.denoiser = engine.denoiser, kept
    for seed, (got, wanted) in enumerate(zip(results, whole, strict=True)):
        if seed in queries:
            assert isinstance(got, kq.RequestError)
        else:
            assert np.abs(got.frames - wanted).max() <= 1  # of rounding
    assert narrow.taken[-2:] == [6, 6]  # together again, once those that are refused have gone


def test_a_shape_that_the_network_refuses_leaves_the_others_alone(engine):
    requests = [kq.Request("a ring", frames=frames, steps=2) for frames in (4, 5, 4)]
    engine.denoiser, kept = Narrow(engine.denoiser), engine.denoiser
    results = list(engine.generate_many(requests, on_error="return"))
    clips = engine.generate_many(requests)
    assert isinstance(next(clips), kq.Clip)
    with pytest.raises(kq.ShapeError, match="latents"):
        next(clips)
    engine.denoiser = kept
    assert [type(result) for result in results] == [kq.Clip, kq.ShapeError, kq.Clip]


def test_what_is_not_finite_is_named_with_its_step(engine):
    engine.denoiser, kept = Fragile(engine.denoiser, poison=600), engine.denoiser
    results = list(
        engine.generate_many(
            [
                kq.Request("a ring", frames=3, steps=2),  # timesteps 501 and 1
                kq.Request("a bad ring", frames=3, steps=5, seed=1),
            ],
            on_error="return",
        )
    )
    engine.denoiser = kept
    assert "at step 1 of 2 of request 0 ('a ring')" in str(results[0])
    assert "at step 3 of 5 of request 1 ('a bad ring')" in str(results[1])


def test_equal_references_at_equal_steps_share_one_source_row(engine, reference):
    same = kq.Clip.from_array(reference.frames.copy())
    fragile = Fragile(engine.denoiser)
    engine.denoiser, kept = fragile, engine.denoiser
    requests = [
        kq.Request("a ring", control, frames=4, steps=2, seed=seed)
        for seed, control in enumerate(
            [
                kq.MotionInjection(reference),
                kq.MotionInjection(same),
                kq.QueryInjection(same, until=1.0),
                kq.MotionInjection(reference.mirror()),
                kq.MotionInjection(reference, source_prompt="a ring"),
            ]
        )
    ]
    list(engine.generate_latents(requests))
    engine.denoiser = kept
    assert fragile.seen == [10 + 3] * 2


def test_progress_counts_every_step(engine):
    seen = []
    requests = [kq.Request("a ring", frames=3, steps=s) for s in (2, 3)]
    list(engine.generate_many(requests, progress=lambda *event: seen.append(event)))
    steps = [event[1:] for event in seen if event[0] == "denoising"]
    assert steps[-1] == (5, 5)
    assert steps == sorted(steps)
    assert ("decoding", 1, 1) in seen


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_in_order(order):
    assert list(in_order((index, f"clip {index}") for index in order)) == [
        "clip 0",
        "clip 1",
        "clip 2",
    ]
