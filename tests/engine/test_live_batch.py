"""Requests of many threads in one batch: who joins whom, and who is told of what goes wrong."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import kinetiq
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.errors import BusyError, NonFiniteError, RequestError, WorkError
from kinetiq.live_batch import LiveBatch
from kinetiq.request import Request

SECONDS = 60  # in which a test that hangs has failed


class Walker:
    """An engine whose clips take as many steps as the request says, and wait to be let go on."""

    def __init__(self):
        self.step = threading.Semaphore(0)
        self.stepping = threading.Event()
        self.batches = []
        self.fails = {}

    def generate_as_completed(self, requests, *, max_clips):
        running, more, place = [], True, 0
        while running or more:
            while more and len(running) < max_clips:
                request = next(requests, "end")
                if request in (None, "end"):
                    more = request is None
                    break
                running.append([place, request, request.steps])
                place += 1
            if not running:
                continue
            self.batches.append([request.prompt for _, request, _ in running])
            self.stepping.set()
            assert self.step.acquire(timeout=SECONDS)
            self.stepping.clear()
            for each in list(running):
                each[2] -= 1
                failure = self.fails.get(each[1].prompt)
                if isinstance(failure, RuntimeError | SystemExit):
                    raise failure
                if failure is not None or not each[2]:
                    running.remove(each)
                    yield each[0], failure or f"clip of {each[1].prompt}"

    def go(self, steps=1):
        for _ in range(steps):
            assert self.stepping.wait(SECONDS)
            self.stepping.clear()
            self.step.release()


@pytest.fixture
def walker():
    return Walker()


def ask(prompt, steps=1):
    return Request(prompt, steps=steps)


class TestJoining:
    def test_requests_join_what_is_under_way_at_the_next_step(self, walker):
        with LiveBatch(walker, max_clips=2) as batch:
            first = batch.submit(ask("a", 3))
            assert walker.stepping.wait(SECONDS)
            second, third = batch.submit(ask("b")), batch.submit(ask("c"))
            assert (batch.running, batch.waiting) == (1, 2)
            walker.go()
            assert walker.stepping.wait(SECONDS)
            walker.go()
            assert second.result(SECONDS) == "clip of b"
            walker.go()
            assert first.result(SECONDS) == "clip of a"
            assert third.result(SECONDS) == "clip of c"
        assert walker.batches == [["a"], ["a", "b"], ["a", "c"]]

    def test_it_waits_for_nothing_and_wakes(self, walker):
        walker.step.release(100)
        with LiveBatch(walker) as batch:
            for number in range(3):
                assert batch.submit(ask(str(number))).result(SECONDS) == f"clip of {number}"
                assert (batch.running, batch.waiting) == (0, 0)

    def test_no_more_than_so_many_wait(self, walker):
        with LiveBatch(walker, max_clips=1, most_waiting=2) as batch:
            clips = [batch.submit(ask("a"))]
            assert walker.stepping.wait(SECONDS)
            clips += [batch.submit(ask("b")), batch.submit(ask("c"))]
            with pytest.raises(BusyError, match=r"at most 2 requests may wait .*ask again later"):
                batch.submit(ask("d"))
            walker.step.release(3)
            assert [clip.result(SECONDS) for clip in clips] == [f"clip of {name}" for name in "abc"]


class TestFailing:
    def test_what_goes_wrong_is_said_to_whom_it_concerns(self, walker):
        walker.fails["b"] = NonFiniteError("step 1: latents must be finite")
        walker.step.release(100)
        with LiveBatch(walker) as batch:
            clips = [batch.submit(ask(name)) for name in "abc"]
            assert clips[0].result(SECONDS) == "clip of a"
            with pytest.raises(NonFiniteError, match="latents must be finite"):
                clips[1].result(SECONDS)
            assert clips[2].result(SECONDS) == "clip of c"

    def test_a_batch_that_breaks_fails_its_clips_and_no_others(self, walker, capfd):
        walker.fails["b"] = RuntimeError("a fault")
        with LiveBatch(walker, max_clips=2) as batch:
            first = batch.submit(ask("a", 5))
            assert walker.stepping.wait(SECONDS)
            broken, later = batch.submit(ask("b")), batch.submit(ask("c"))
            walker.step.release(10)
            for clip in (first, broken):
                with pytest.raises(WorkError, match="the batch failed: RuntimeError: a fault"):
                    clip.result(SECONDS)
            assert later.result(SECONDS) == "clip of c"
        assert "RuntimeError: a fault" in capfd.readouterr().err

    def test_what_is_no_request_is_refused(self, walker):
        with LiveBatch(walker) as batch:
            for what in (None, "a ring"):
                with pytest.raises(RequestError, match="must be a Request here, got"):
                    batch.submit(what)

    def test_one_that_waits_can_be_cancelled_and_one_under_way_cannot(self, walker):
        with LiveBatch(walker, max_clips=1) as batch:
            first = batch.submit(ask("a", 2))
            assert walker.stepping.wait(SECONDS)
            second, third, fourth = (batch.submit(ask(name)) for name in "bcd")
            assert not first.cancel()
            assert second.cancel()
            walker.step.release(2)
            assert first.result(SECONDS) == "clip of a"
            assert walker.stepping.wait(SECONDS)
            assert fourth.cancel()
            batch.close()
            walker.step.release(1)
            assert third.result(SECONDS) == "clip of c"
        assert walker.batches == [["a"], ["a"], ["c"]]

    def test_whoever_waits_is_told_where_the_thread_ends(self, walker, monkeypatch):
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        walker.fails["a"] = SystemExit()
        with LiveBatch(walker, max_clips=1) as batch:
            clips = [batch.submit(ask("a")), batch.submit(ask("b"))]
            walker.step.release(1)
            for clip in clips:
                with pytest.raises(BusyError, match="within a `with` block"):
                    clip.result(SECONDS)
            with pytest.raises(BusyError):
                batch.submit(ask("c"))


class TestClosing:
    def test_nothing_is_taken_outside_of_a_block(self, walker):
        batch = LiveBatch(walker)
        for _ in range(2):
            with pytest.raises(BusyError, match="are taken within a `with` block"):
                batch.submit(ask("a"))
            with pytest.raises(BusyError, match="are taken within a `with` block"):
                batch.require_room()
            batch.close()

    def test_it_does_nothing_where_there_is_nothing_to_do(self, walker, monkeypatch):
        drawn = []
        draw = LiveBatch._draw

        def drawing(batch):
            for request in draw(batch):
                drawn.append(request)
                yield request

        monkeypatch.setattr(LiveBatch, "_draw", drawing)
        walker.step.release(1)
        with LiveBatch(walker) as batch:
            batch.submit(ask("a")).result(SECONDS)
            time.sleep(0.1)
        assert len(drawn) <= 3

    def test_what_is_under_way_is_finished_and_what_waits_given_up(self, walker):
        with LiveBatch(walker, max_clips=1) as batch:
            under_way = batch.submit(ask("a", 2))
            assert walker.stepping.wait(SECONDS)
            waiting = batch.submit(ask("b"))
            batch.close()
            with pytest.raises(BusyError, match="ask again then"):
                waiting.result(SECONDS)
            with pytest.raises(BusyError, match="ask again then"):
                batch.submit(ask("c"))
            walker.step.release(2)
        assert under_way.result(0) == "clip of a"

    def test_nothing_is_left_behind(self, walker):
        before = threading.active_count()
        with LiveBatch(walker):
            assert threading.active_count() == before + 1
        assert threading.active_count() == before


def test_clips_are_those_of_generate():
    """Of the embedded model, asked for by threads of their own while others are under way."""
    asked = [("a red circle", 3, 6), ("a blue ring", 4, 3), ("a gold star", 5, 4)]
    with Engine.load("sprites") as engine:
        wanted = [engine.generate(prompt, seed=seed, steps=steps) for prompt, seed, steps in asked]
        with kinetiq.LiveBatch(engine) as batch:
            clips = [
                batch.submit(Request(prompt, seed=seed, steps=steps))
                for prompt, seed, steps in asked
            ]
            broken = batch.submit(Request("a ring", frames=1000))
            made = [clip.result(SECONDS) for clip in clips]
            with pytest.raises(kinetiq.KinetiqError, match="frames"):
                broken.result(SECONDS)
    for one, other in zip(made, wanted, strict=True):
        difference = np.abs(one.frames.astype(int) - other.frames.astype(int))
        assert (
            difference.max() <= 1
        )  # the last digit, where sums of a batch add up in another order


def test_it_takes_a_default_of_clips():
    seen = SimpleNamespace()

    class Engine:
        def generate_as_completed(self, requests, *, max_clips):
            seen.max_clips = max_clips
            for place, _ in enumerate(requests):
                yield place, Clip(np.zeros((1, 1, 1, 3), np.uint8), 8.0)

    with LiveBatch(Engine()) as batch:
        batch.submit(ask("a")).result(SECONDS)
    assert seen.max_clips == 8
