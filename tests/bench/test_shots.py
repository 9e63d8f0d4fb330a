"""The bench of consistent shots, with the generation replaced by clips whose looks are known."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from kinetiq.bench import shots
from kinetiq.bench.figures import load_targets
from kinetiq.bench.harness import BENCHES, BenchOptions, Progress
from kinetiq.errors import RequestError
from kinetiq.motion_injection import MotionInjection
from kinetiq.sprites import cases, world

SAMPLE = shots.Sample(boards=2, shots=3, ablated=1, repeats=1, warmup=0)


class Painter:
    """Boards are of one hue and texture, shots left alone of a hue of their own and no motion."""

    asked = ()  # a list of the test under way

    @classmethod
    def load(cls, *_, **__):
        return cls()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @staticmethod
    def paint(request, hue, texture, motion=None):
        words = request.prompt.split()
        said = next(m for m, phrase in world.MOTION_PHRASES.items() if phrase in request.prompt)
        path = world.Path(motion or said, 0.3)
        sprite = world.Sprite(words[1], hue, path, texture)
        ground = world.COLOURS[words[words.index("dark") + 1]]
        return cases.render_clip(world.Scene((sprite,), background_hue=ground), frames=8)

    def generate_storyboards(self, boards):
        for board in boards:
            type(self).asked.append(board)
            hue, texture = 37.0 * board.requests()[0].seed, "striped"
            clips = [
                self.paint(request, hue if any(board.keys_window) else hue + 50.0 * number, texture)
                for number, request in enumerate(board.requests())
            ]
            yield SimpleNamespace(clips=clips)

    def generate_many(self, requests):
        for request in requests:
            texture = world.TEXTURES[request.seed % 3]
            yield self.paint(request, 25.0, texture, motion="still")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The figures of one run, what was asked for, and the folder of the picture."""
    folder = tmp_path_factory.mktemp("shots") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Painter, "asked", [])
        patch.setattr(shots, "Engine", Painter)
        patch.setattr(shots, "FULL", SAMPLE)
        # What says no motion is not painted: references have a test of their own.
        patch.setattr(shots, "_references", lambda *_: {})
        figures = shots.measure(BenchOptions(out=folder), Progress())
        return figures, Painter.asked, folder


def test_boards_are_judged_by_what_no_prompt_says(measured):
    figures, _, folder = measured
    value = {name: figure.value for name, figure in figures.items()}
    assert value["shots.consistency"] == value["shots.hue_consistency"] == 1.0
    assert value["shots.texture_consistency"] == value["shots.motion_accuracy"] == 1.0
    assert value["shots.plain.hue_consistency"] == 1.0
    assert value["shots.plain.texture_consistency"] == value["shots.plain.consistency"] == 0.0
    still = np.mean([m.motion == "still" for c in _cases() for k in c.captions for m in k.mentions])
    assert value["shots.plain.motion_accuracy"] == pytest.approx(still)
    assert value["shots.consistency_gain"] == 1.0
    assert value["shots.motion_drop"] == pytest.approx(still - 1.0)
    assert value["shots.background_drop"] == value["shots.shape_drop"] == 0.0
    assert figures["shots.consistency"].n == 2  # boards, not their shots or pairs
    assert figures["shots.ablation.keys.consistency"].n == 1
    assert value["shots.ablation.paper.without_keys.hue_consistency"] == 0.0  # as painted
    assert value["shots.ablation.paper.no_queries.hue_consistency"] == 1.0
    with Image.open(folder / "shots.png") as picture:
        assert picture.height > 12 * 96  # a row for each shot of two boards, and for it left alone


def _cases():
    return cases.shot_boards(SAMPLE.boards, SAMPLE.shots)


def test_every_ablation_changes_what_it_says(measured):
    figures, asked, _ = measured
    whole, rest = asked[: SAMPLE.boards], asked[SAMPLE.boards :]
    assert all(board == shots.as_board(case) for board, case in zip(whole, _cases(), strict=True))
    assert {board.steps for board in asked} == {shots.STEPS}
    ablated = rest[: SAMPLE.ablated * len(shots.ABLATIONS)]
    for number, (name, switches) in enumerate(shots.ABLATIONS.items()):
        board = ablated[number]
        assert {key: getattr(board, key) for key in switches} == switches
        assert board.shots == whole[0].shots and board != whole[0]
        assert f"shots.ablation.{name}.motion_accuracy" in figures
    timed = rest[len(ablated) :]
    assert [board.vanilla for board in timed] == ["beside", "beside", "before"]
    assert figures["shots.cost"].n == figures["shots.cost_paper_before"].n == 1


def test_references_move_as_captions_say_and_look_otherwise():
    from kinetiq.sprites import metrics
    from kinetiq.sprites.reading import read_clips

    case = cases.shot_boards(1, 3, seed=2)[0]
    made = shots._steered_shots(case)
    for shot, caption, seed in zip(made, case.captions, case.seeds, strict=True):
        assert isinstance(shot.control, MotionInjection) and shot.seed == seed
        assert shot.prompt == caption.without_motion().text
        reading = read_clips(shot.control.reference.frames[None])
        assert metrics.motion_accuracy(reading, [caption]).mean == 1.0
        assert reading[0].sprites[0].shape != case.subject


def test_quick_is_small_and_the_bench_is_listed(monkeypatch):
    monkeypatch.setattr(Painter, "asked", [])
    monkeypatch.setattr(shots, "Engine", Painter)
    figures = shots.measure(BenchOptions(quick=True), Progress())
    assert len(Painter.asked) == 3 and {len(board.shots) for board in Painter.asked} == {2}
    assert {"shots.consistency", "shots.motion_drop", "shots.cost"} <= set(figures)
    assert BENCHES.load("shots") is shots.BENCH
    targets = {name for name in load_targets() if name.startswith("shots.")}
    assert targets == {"shots.consistency", "shots.motion_drop", "shots.cost"}


def test_storyboards_leave_hue_and_texture_open_and_deal_the_rest_evenly():
    boards = cases.shot_boards(16, 5)
    assert cases.shot_boards(16, 5) == boards != cases.shot_boards(16, 5, seed=1)
    motions, backgrounds = [], []
    for number, board in enumerate(boards):
        assert board.subject == world.SHAPES[number % 5]
        assert all(f"a {board.subject} " in prompt for prompt in board.prompts)
        mentions = [caption.mentions[0] for caption in board.captions]
        assert {(m.shape, m.colour, m.texture) for m in mentions} == {(board.subject, None, None)}
        motions += [m.motion for m in mentions]
        backgrounds += [caption.background for caption in board.captions]
        assert len(set(motions[-5:])) == len(set(backgrounds[-5:])) == 5
    assert {motions.count(motion) for motion in world.MOTIONS} == {10}
    assert {backgrounds.count(colour) for colour in world.COLOURS} == {10}
    seeds = [seed for board in boards for seed in board.seeds]
    assert seeds == list(range(80))


@pytest.mark.parametrize("count", [1, 9])
def test_storyboards_of_one_shot_or_more_than_motions_are_refused(count):
    with pytest.raises(RequestError, match=f"shots must be 2 to 8, one motion each, got {count}"):
        cases.shot_boards(1, count)
