import dataclasses

import pytest

from kinetiq.bench import query, sprites
from kinetiq.bench.harness import BenchOptions, Progress
from kinetiq.sprites.cases import TransferScores
from kinetiq.sprites.metrics import Interval


def scores(fidelity, leak):
    def interval(value):
        return Interval(value, value, value, 8)

    return TransferScores(
        **{
            field.name: interval(
                {"motion_fidelity": fidelity, "identity_leak": leak}.get(field.name, 1.0)
            )
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
        return scores(max(untils, default=0.0), max(untils, default=0.0) ** 2)

    monkeypatch.setattr(query, "Engine", Engine)
    monkeypatch.setattr(query, "transfer", transfer)
    monkeypatch.setattr(query, "score_transfer", score)
    return seen


def test_measures_every_curve_at_every_tenth(settings, tmp_path):
    figures = query.measure(BenchOptions(out=tmp_path), Progress())
    for variant in query.CURVES:
        for tenth in range(1, 11):
            name = f"{variant.name}.until_{tenth:02d}.motion_fidelity"
            assert figures[name].value == pytest.approx(tenth / 10)
    for variant in query.PARTS:
        assert f"{variant.name}.identity_leak" in figures
    assert {count for _, count, _, _ in settings} == {query.CURVE_PAIRS_ON_CPU, 64}
    assert {steps for _, _, steps, _ in settings} == {query.STEPS}
    assert (tmp_path / "query.png").stat().st_size > 10_000


def test_the_best_setting_is_judged_on_pairs_that_did_not_choose_it(settings):
    figures = query.measure(BenchOptions(), Progress())
    assert figures["query.motion_fidelity"].value == 0.5  # where u - u*u is largest
    assert figures["injection.motion_fidelity"].value == 0.5
    assert figures["query.paper_fidelity"].value == pytest.approx(0.4)
    assert figures["query.plain_fidelity"].value == 0.0
    assert figures["query.spatial.until_05.headline_fidelity"].value == 0.5
    assert figures["injection.qkv.until_05.headline_fidelity"].value == 0.5
    scenes = [scene for _, _, _, scene in settings]
    assert scenes[-1] == scenes[-2]
    assert scenes[-1] not in scenes[:-2]


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
    for name in ("colour", "background", "shape", "texture", "motion"):
        assert figures[f"sprites.{name}_accuracy"].value == 1.0
        assert figures[f"sprites.heldout.{name}_accuracy"].value == 1.0
    assert figures["sprites.heldout_drop"].value == 0.0
    assert figures["sprites.seconds_per_clip"].value == 0.5
