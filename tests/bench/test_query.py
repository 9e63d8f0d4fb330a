import dataclasses

import pytest

from kinetiq.bench import query, sprites
from kinetiq.bench.harness import BenchOptions, Progress
from kinetiq.sprites.cases import TransferScores
from kinetiq.sprites.metrics import Interval


def scores(fidelity, leak):
    def interval(value):
        return Interval(value, value, value, 8)

    each = {
        "fidelities": (fidelity,) * 8,
        "leaks": tuple(number < round(8 * leak) for number in range(8)),
        "colours_right": (True,) * 7 + (fidelity < 0.5,),
    }
    means = {"motion_fidelity": fidelity, "identity_leak": leak}
    return TransferScores(
        **{
            field.name: each.get(field.name, interval(means.get(field.name, 1.0)))
            for field in dataclasses.fields(TransferScores)
        }
    )


@pytest.fixture
def settings(monkeypatch):
    """The bench with the generation replaced by scores that depend on the setting alone."""
    seen = []

    class Engine:
        @classmethod
        def load(cls, *_, **__):
            return cls()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def transfer(engine, pairs, control, *, steps=None, **_):
        reference = pairs[0].reference()
        seen.append((control(reference), len(pairs), steps, pairs[0].scene))
        return control(reference)

    def score(controls, _):
        untils = [control.until for control in controls]
        until = max(untils, default=0.0)
        return scores(until, until**2 / 1.2)

    monkeypatch.setattr(query, "Engine", Engine)
    monkeypatch.setattr(query, "transfer", transfer)
    monkeypatch.setattr(query, "score_transfer", score)
    return seen


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_measures_every_curve_at_its_tenths(settings, tmp_path, device):
    figures = query.measure(BenchOptions(out=tmp_path, device=device), Progress())
    tenths = {"cpu": query.TENTHS_ON_CPU, "cuda": query.ALL_TENTHS}[device]
    points = [name for name in figures if ".until_" in name and name.endswith(".motion_fidelity")]
    assert len(points) == len(query.CURVES) * len(tenths)
    for variant in query.CURVES:
        for tenth in tenths:
            name = f"{variant.name}.until_{tenth:02d}.motion_fidelity"
            assert figures[name].value == pytest.approx(tenth / 10)
    for variant in query.PARTS:
        assert f"{variant.name}.identity_leak" in figures
    curve_pairs = {"cpu": query.CURVE_PAIRS_ON_CPU, "cuda": 64}[device]
    assert {count for _, count, _, _ in settings} == {curve_pairs, 64}
    assert {steps for _, _, steps, _ in settings} == {query.STEPS}
    assert (tmp_path / "query.png").stat().st_size > 10_000


def test_the_best_setting_is_judged_on_pairs_that_did_not_choose_it(settings):
    figures = query.measure(BenchOptions(), Progress())
    assert figures["query.motion_fidelity"].value == pytest.approx(
        0.6
    )  # where u - u*u/1.2 is largest
    assert figures["injection.motion_fidelity"].value == pytest.approx(0.6)
    assert figures["query.paper_fidelity"].value == pytest.approx(0.4)
    assert figures["query.plain_fidelity"].value == 0.0
    assert figures["query.spatial.until_06.headline_fidelity"].value == pytest.approx(0.6)
    assert figures["injection.qkv.until_06.headline_fidelity"].value == pytest.approx(0.6)
    assert figures["query.plain_background_accuracy"].value == 1.0
    assert figures["injection.frame_consistency"].value == 1.0
    # Every headline is of the same pairs, so that it can be compared with plain sampling.
    scenes = [scene for _, _, _, scene in settings]
    heads = len([name for name in figures if name.endswith(".headline_fidelity")])
    assert heads == 6
    assert all(scene is scenes[-1] for scene in scenes[-heads:])
    assert scenes[-1] not in scenes[:-heads]


def test_costs_are_differences_on_the_same_pairs(settings):
    figures = query.measure(BenchOptions(), Progress())
    drop, extra = figures["injection.colour_drop"], figures["injection.extra_leak"]
    assert drop.value == 1 / 8 and drop.n == 8 and drop.low < 1 / 8 < drop.high
    assert extra.value == 2 / 8 and extra.n == 8 and extra.low < 2 / 8 < extra.high
    assert figures["query.extra_leak"].value == 2 / 8
    assert figures["query.leak_reduced_extra_leak"].value == 0.0  # both curves are the same here
    assert figures["query.leak_reduced_extra_fidelity"].value == 0.0


def test_leak_is_compared_where_two_curves_are_nearest_in_fidelity_and_steer():
    one = {"a.until_01": 0.0, "a.until_02": 0.31, "a.until_03": 0.6, "a.until_04": 0.9}
    other = {"b.until_01": 0.0, "b.until_02": 0.2, "b.until_03": 0.5, "b.until_04": 0.57}
    points = {name: scores(fidelity, 0.0) for name, fidelity in {**one, **other}.items()}
    assert query.nearest_in_fidelity("a", "b", points) == ("a.until_03", "b.until_04")
    # Curves that go the wrong way are compared all the same.
    wrong = {name: scores(-1 - number, 0.0) for number, name in enumerate(points)}
    assert query.nearest_in_fidelity("a", "b", wrong) == ("a.until_04", "b.until_01")


def test_quick_is_small(settings):
    query.measure(BenchOptions(quick=True), Progress())
    assert max(count for _, count, _, _ in settings) == 8


def test_sprites_names_every_accuracy(monkeypatch):
    from kinetiq.sprites import cases
    from kinetiq.sprites.reading import read_clips

    def generate(_, captions, __):
        import numpy as np

        from kinetiq.sprites import world

        frames = []
        for caption in captions:
            mention = caption.mentions[0]
            sprite = world.Sprite(
                mention.shape,
                world.COLOURS[mention.colour],
                world.Path(mention.motion),
                texture=mention.texture,
            )
            scene = world.Scene((sprite,), background_hue=world.COLOURS[caption.background])
            frames.append(cases.render_clip(scene).frames)
        return read_clips(np.stack(frames)), 0.5

    class Engine:
        @classmethod
        def load(cls, *_, **__):
            return cls()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(sprites, "Engine", Engine)
    monkeypatch.setattr(sprites, "_generate", generate)
    figures = sprites.measure(BenchOptions(quick=True), Progress())
    assert "sprites.heldout_drop.texture" not in figures
    for name in ("colour", "background", "shape", "texture", "motion"):
        assert figures[f"sprites.{name}_accuracy"].value == 1.0
        assert figures[f"sprites.heldout.{name}_accuracy"].value == 1.0
    for name in ("", ".colour", ".background", ".shape", ".motion"):
        drop = figures[f"sprites.heldout_drop{name}"]
        assert drop.value == 0.0 and drop.low < 0 < drop.high
    by_shape = [figures[name] for name in figures if name.startswith("sprites.shape_accuracy.")]
    assert sum(shape.n for shape in by_shape) == 32 and {shape.value for shape in by_shape} == {1.0}
    assert figures["sprites.seconds_per_clip"].value == 0.5
