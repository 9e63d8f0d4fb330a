"""Exported networks in the hands of Polygraphy, NVIDIA's tool that looks into and runs them."""

import pytest
import torch
from exported import small_checkpoint

pytest.importorskip("onnx", reason="the extra 'export' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install polygraphy")

from polygraphy.comparator import RunResults
from polygraphy.json import save_json
from polygraphy.tools import main

from kinetiq.export.check import TOLERANCE
from kinetiq.export.denoiser import CHANNELS
from kinetiq.export.example import example_shapes, make_example
from kinetiq.export.nodes import KINDS
from kinetiq.export.onnxruntime_denoiser import OnnxruntimeDenoiser

# Polygraphy asks for plugins in a way that Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:SelectableGroups dict:DeprecationWarning")


def test_it_inspects_a_network(exported, capfd):
    assert not main(["inspect", "model", str(exported())])
    said = capfd.readouterr().out
    assert "Other Opsets: {'kinetiq': 1}" in said
    for tensor in OnnxruntimeDenoiser(exported()).metadata.inputs:
        assert f"{tensor.name} [dtype={tensor.dtype}, shape=(" in said


def test_it_runs_a_network_with_all_controls(exported, tmp_path):
    denoiser = OnnxruntimeDenoiser(exported())
    example = make_example(
        small_checkpoint("animatediff").unet,
        denoiser.metadata,
        example_shapes(denoiser.metadata)[1],
        KINDS,
    )
    given = (example.latents, example.timesteps, example.text, example.controls)
    inputs = denoiser.inputs_of(*given, KINDS) | {CHANNELS: torch.tensor([3, 0])}
    asked, got = tmp_path / "inputs.json", tmp_path / "outputs.json"
    save_json([{name: tensor.numpy() for name, tensor in inputs.items()}], str(asked))
    words = ["run", str(exported()), "--onnxrt", "--load-inputs", asked, "--save-outputs", got]
    assert not main([str(word) for word in words])
    outputs = RunResults.load(str(got))[0][1][0]
    expected = denoiser.predict(*given).numpy()
    error = abs(outputs["prediction"] - expected).max()
    assert error <= TOLERANCE * abs(expected).max()
    assert outputs["motion"].shape[-1] == 2
