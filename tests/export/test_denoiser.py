"""What becomes of controls on their way into an exported graph, which is not run here."""

import re
from dataclasses import replace

import pytest
import torch
from exported import TAP, small_checkpoint, small_metadata

pytest.importorskip("onnx", reason="the extra 'export' is not installed")

from kinetiq.control_tensors import (
    ControlTensors,
    LoraBank,
    LoraControl,
    MotionBank,
    MotionControl,
)
from kinetiq.errors import CheckpointError, RequestError, ShapeError
from kinetiq.export.denoiser import GraphDenoiser
from kinetiq.export.example import example_shapes, make_example
from kinetiq.export.nodes import KINDS
from kinetiq.families import SiteKind


class Recording(GraphDenoiser):
    """Keeps what the graph would be given."""

    def run(self, inputs, kinds, output):  # noqa: ARG002  the base class fixes the signature
        self.inputs = inputs
        return torch.zeros(self.output_shape(output, inputs))


@pytest.fixture(scope="module")
def checkpoint():
    return small_checkpoint("animatediff")


@pytest.fixture
def denoiser(checkpoint):
    return Recording(small_metadata(checkpoint), "graph", torch.device("cpu"))


@pytest.fixture
def example(checkpoint, denoiser):
    shape = example_shapes(denoiser.metadata)[1]
    return make_example(checkpoint.unet, denoiser.metadata, shape, KINDS)


def predict(denoiser, example, **changes):
    controls = ControlTensors(**changes) if changes else example.controls
    return denoiser.predict(example.latents, example.timesteps, example.text, controls)


def change_banks(control, **parts):
    banks = {site: replace(bank, **parts) for site, bank in control.banks.items()}
    return replace(control, banks=banks)


@pytest.mark.parametrize(
    "lost",
    [{"query_key": None}, {"value": None}, {"query_key": None, "value": None}],
    ids=",".join,
)
def test_projections_of_a_motion_alone_are_refused(denoiser, example, lost):
    motion = change_banks(example.controls.motion, **lost)
    with pytest.raises(RequestError, match=r"^graph: a motion's embedding must be given beside "):
        predict(denoiser, example, motion=motion)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("query", "row"),
        ("deviation", "row"),
        ("motion", "slot"),
        ("lora", "slot"),
    ],
)
def test_indices_of_nothing_are_refused(denoiser, example, kind, name):
    control = getattr(example.controls, kind)
    index = getattr(control, name)
    if kind in ("query", "deviation"):
        count = len(example.latents)
    else:
        bank = next(iter(control.banks.values()))
        count = len(bank.value if kind == "motion" else bank.down)
    for wrong in (-1, count):
        given = index.clone()
        given.flatten()[-1] = wrong
        words = rf"^graph: {kind}_{name} must be from 0 to {count - 1}, got .*{wrong}\b"
        with pytest.raises(ShapeError, match=words):
            predict(denoiser, example, **{kind: replace(control, **{name: given})})
    given.flatten()[-1] = count - 1
    predict(denoiser, example, **{kind: replace(control, **{name: given})})


def test_a_motion_of_which_nothing_is_left_is_none(denoiser, example):
    slot, scale = torch.ones(3, dtype=torch.int64), torch.ones(3)
    temporal = next(iter(example.controls.motion.banks))
    for banks in ({}, {temporal: MotionBank()}):
        predict(denoiser, example, motion=MotionControl(slot, scale, banks))
        assert not denoiser.inputs["motion_slot"].any()
    predict(denoiser, example, lora=LoraControl(slot, scale, {}))
    assert not denoiser.inputs["lora_slot"].any()


def test_a_site_with_fewer_motions_than_another_is_filled_up(denoiser, example):
    motion = example.controls.motion
    site, bank = next(iter(motion.banks.items()))
    name = denoiser.sites[site].name
    fewer = {**motion.banks, site: MotionBank(query_key=bank.query_key[:2])}
    predict(denoiser, example, motion=replace(motion, banks=fewer))
    inputs = {name: one for name, one in denoiser.inputs.items() if name.startswith("motion.")}
    assert {len(given) for given in inputs.values()} == {3}
    sent = inputs[f"motion.{name}.query_key"]
    assert torch.equal(sent[:2], bank.query_key[:2].unsqueeze(2))
    assert not sent[2].any()


@pytest.mark.parametrize(
    ("part", "cut", "got"),
    [
        ("query_key", (slice(None), slice(4)), r"\[3, 4, 16\]"),
        ("value", (slice(None), slice(4)), r"\[3, 4, 24, 16\]"),
        ("value", (slice(None), slice(None), slice(23)), r"\[3, 5, 23, 16\]"),
        ("query_key", (..., slice(15)), r"\[3, 5, 15\]"),
        ("value", (slice(0),), r"\[0, 5, 24, 16\]"),
    ],
)
def test_banks_of_another_size_are_refused(denoiser, example, part, cut, got):
    motion = example.controls.motion
    site, bank = next(iter(motion.banks.items()))
    name = denoiser.sites[site].name
    wrong = replace(bank, **{part: getattr(bank, part)[cut]})
    tokens = "24, " * (part == "value")
    words = (
        rf"^graph: {part} of a motion at {name} must be \[slots, 5, {tokens}16\] beside latents of "
        rf"5 frames of 4x6, got {got}; make its banks for the size of the clip$"
    )
    with pytest.raises(ShapeError, match=words):
        predict(denoiser, example, motion=replace(motion, banks={**motion.banks, site: wrong}))


def test_loras_that_do_not_fit_are_refused(denoiser, example):
    lora = example.controls.lora
    path, bank = next(iter(lora.banks.items()))
    down, up = bank.down, bank.up
    for wrong in (
        LoraBank(down[:2], up),
        LoraBank(down[:, :1], up),
        LoraBank(down[..., :3], up),
        LoraBank(down, up[:, :3]),
        LoraBank(down[:0], up[:0]),
        LoraBank(down[0], up[0]),
        LoraBank(down[:, :0], up[..., :0]),
    ):
        words = (
            rf"^graph: a LoRA of {path} must be down \[slots, rank, 16\] and up \[slots, 16, rank\], "
            rf"got {re.escape(str(list(wrong.down.shape)))} and .*; make its banks for this network$"
        )
        with pytest.raises(ShapeError, match=words):
            predict(denoiser, example, lora=replace(lora, banks={**lora.banks, path: wrong}))
    narrow = LoraBank(down[:2, :1], up[:2, :, :1])
    predict(denoiser, example, lora=replace(lora, banks={**lora.banks, path: narrow}))
    assert denoiser.inputs[f"lora.{path}.down"].shape == down.shape


@pytest.mark.parametrize("place", [0, 99, -1])
def test_motions_where_none_can_be_are_refused(denoiser, example, place):
    motion = example.controls.motion
    assert denoiser.sites[0].kind is not SiteKind.TEMPORAL
    bank = next(iter(motion.banks.values()))
    name = rf", {denoiser.sites[0].name}" if place == 0 else ""
    words = (
        rf"^graph: a motion must be at temporal sites of the network, .* of its "
        rf"{len(denoiser.sites)}, got site {place}{name}; make its banks for this network$"
    )
    with pytest.raises(CheckpointError, match=words):
        predict(denoiser, example, motion=replace(motion, banks={**motion.banks, place: bank}))


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        ([0, 32], "channels must be from 0 to 31, got 0 to 32; choose among the 32 channels of"),
        ([-1], "channels must be from 0 to 31, got -1 to -1; choose among the 32 channels of"),
        ([], r"channels must be int64 \[K\], one at the least, got int64 \[0\]; give the"),
        ([[1]], r"channels must be int64 \[K\], one at the least, got int64 \[1, 1\]; give the"),
        ([1.0], r"channels must be int64 \[K\], one at the least, got float32 \[1\]; give the"),
    ],
)
def test_channels_that_a_block_has_not_are_refused(denoiser, example, channels, words):
    given = (example.latents, example.timesteps, example.text, example.controls, TAP)
    index = torch.tensor(channels) if channels else torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ShapeError, match=rf"^graph: {words}"):
        denoiser.motion(*given, index)
    denoiser.motion(*given, torch.tensor([31, 0]))


def test_gradients_are_refused_of_every_input(denoiser, example):
    bank = next(iter(example.controls.lora.banks.values()))
    for tensor in (example.latents, example.text, example.controls.query.blend, bank.up):
        tensor.requires_grad_()
        with pytest.raises(RequestError, match=r"got gradients of prediction; load the model with"):
            predict(denoiser, example)
        with torch.no_grad():
            predict(denoiser, example)
        tensor.requires_grad_(False)
    predict(denoiser, example)


def test_banks_are_made_again_where_they_are_others(denoiser, example):
    motion = example.controls.motion
    site, bank = next(iter(motion.banks.items()))
    name = f"motion.{denoiser.sites[site].name}.value"
    banks = dict(motion.banks)
    control = replace(motion, banks=banks)
    predict(denoiser, example, motion=control)
    first = denoiser.inputs[name]
    predict(denoiser, example, motion=control)
    assert denoiser.inputs[name] is first  # all steps have the same
    banks[site] = replace(bank, value=2 * bank.value)
    predict(denoiser, example, motion=control)
    assert torch.equal(denoiser.inputs[name], 2 * bank.value)
    # In place, where the graph was given a copy.
    narrow = change_banks(control, query_key=None, projected_query=None, projected_key=None)
    narrow.banks[site].value.mul_(3)
    denoiser.least = {"motion_slots": 9}
    predict(denoiser, example, motion=narrow)
    narrow.banks[site].value.mul_(0)
    predict(denoiser, example, motion=narrow)
    assert not denoiser.inputs[name].any()


def test_an_engine_has_no_inputs_that_none_of_its_outputs_reads(denoiser, example):
    full = denoiser.metadata
    lost = ("skip_source", "skip_gain", "motion_slot")
    path = next(iter(example.controls.lora.banks))
    site, _ = next(iter(example.controls.motion.banks.items()))
    name = denoiser.sites[site].name
    unread = [f"lora.{path}.down", f"lora.{path}.up", f"motion.{name}.value", *lost]
    inputs = tuple(info for info in full.inputs if info.name not in unread)
    engine = Recording(replace(full, inputs=inputs), "engine", torch.device("cpu"))
    for given in (example.controls, ControlTensors()):
        kinds = frozenset(KINDS)
        read = engine.inputs_of(example.latents, example.timesteps, example.text, given, kinds)
        assert set(read) == {info.name for info in inputs} - {"feature_channels"}
    strange = {"mid_block.elsewhere": LoraBank(torch.ones(2, 1, 8), torch.ones(2, 8, 1))}
    with pytest.raises(CheckpointError, match=r"must change projections of the network, got mid_b"):
        predict(engine, example, lora=replace(example.controls.lora, banks=strange))


def test_an_output_that_an_engine_was_built_without_is_refused(denoiser, example):
    outputs = tuple(info for info in denoiser.metadata.outputs if info.name == "features")
    engine = Recording(replace(denoiser.metadata, outputs=outputs), "engine", torch.device("cpu"))
    with pytest.raises(
        RequestError,
        match=r"got the output prediction; it was built with features; build it with outputs that",
    ):
        predict(engine, example)
    given = (example.latents, example.timesteps, example.text, example.controls, TAP)
    with pytest.raises(RequestError, match=r"got the output motion; it was built with features"):
        engine.motion(*given, torch.zeros(1, dtype=torch.int64))
    engine.features(*given)
