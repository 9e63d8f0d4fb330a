"""What becomes of controls on their way into an exported graph, which is not run here."""

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
    for banks in ({}, {1: MotionBank()}):
        predict(denoiser, example, motion=MotionControl(slot, scale, banks))
        assert not denoiser.inputs["motion_slot"].any()
    predict(denoiser, example, lora=LoraControl(slot, scale, {}))
    assert not denoiser.inputs["lora_slot"].any()


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
