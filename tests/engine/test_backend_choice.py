"""Which back end "auto" is, and that it is said."""

import importlib.util
import json
import logging

import pytest
import torch

import kinetiq as kq
from kinetiq import backend_choice
from kinetiq.backend_choice import PRECISIONS, Choice, choose_backend, cpu_kind, read_ratios
from kinetiq.backends import BACKENDS, EAGER
from kinetiq.errors import RequestError


@pytest.fixture
def installed(monkeypatch):
    """All packages of the export are there, but those that a test adds to the set."""
    missing = set()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else object()
    )
    return missing


def ratios(**found):
    return {cpu_kind(): {"float32": found}}


@pytest.mark.parametrize(
    ("found", "backend"),
    [
        ({"onnxruntime": 0.5, "openvino": 0.6}, "onnxruntime"),
        ({"onnxruntime": 0.7, "openvino": 0.6}, "openvino"),
        ({"onnxruntime": 1.2, "openvino": 0.99}, "openvino"),
        ({"onnxruntime": 1.0, "openvino": 1.2}, EAGER),
    ],
)
def test_the_fastest_is_chosen_where_it_beats_eager(installed, found, backend):
    choice = choose_backend("float32", "cpu", ratios(**found))
    assert choice.backend == backend
    if backend == EAGER:
        assert choice.why == f"nothing recorded is faster in float32 on {cpu_kind()}"
    else:
        assert choice.why == (
            f"takes at most {found[backend]:.2f} of eager's time in float32 on {cpu_kind()}"
        )
    assert choose_backend(torch.float32, "cpu", ratios(**found)) == choice


def test_what_is_not_installed_is_named_with_its_command(installed):
    installed.add("onnxruntime")
    both = ratios(onnxruntime=0.5, openvino=0.6)
    choice = choose_backend("float32", "cpu", both)
    assert choice.backend == "openvino"
    assert 'onnxruntime takes 0.50 and lacks onnxruntime: pip install ".[export]"' in choice.why
    installed.add("onnxscript")
    choice = choose_backend("float32", "cpu", both)
    assert choice.backend == EAGER
    assert "lacks onnxscript, onnxruntime" in choice.why and "lacks onnxscript:" in choice.why


@pytest.mark.parametrize(
    ("dtype", "device", "words"),
    [
        ("bfloat16", "cpu", "nothing is recorded for bfloat16 on a CPU of kind "),
        ("float32", "cuda", "nothing is recorded for a cuda device"),
    ],
)
def test_without_a_record_it_is_eager(installed, dtype, device, words):
    choice = choose_backend(dtype, device, ratios(onnxruntime=0.5))
    assert choice.backend == EAGER and words in choice.why
    assert choose_backend("float32", "cpu", {"another kind": ratios()}).backend == EAGER


def test_a_kind_is_the_newest_instructions(monkeypatch):
    able = {"architecture": "x86_64", "avx2": True, "avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert cpu_kind() == "x86_64 avx512_bf16"
    able["architecture"] = "aarch64"
    able |= dict.fromkeys(("avx2", "avx512_bf16"), False)
    assert cpu_kind() == "aarch64"


def check_ratios(table):
    """Require that a table has no words but ours: others would never be looked up."""
    for kinds in table.values():
        assert set(kinds) <= set(PRECISIONS)
        for found in kinds.values():
            assert set(found) <= set(BACKENDS) - {EAGER}
            assert all(ratio > 0 for ratio in found.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"float31": {"openvino": 0.5}},
        {"float32": {"openvine": 0.5}},
        {"float32": {EAGER: 1.0}},
        {"float32": {"openvino": 0.0}},
    ],
)
def test_a_table_of_unknown_words_is_found(wrong):
    check_ratios({"any": {"float32": {"openvino": 0.5}}})
    with pytest.raises(AssertionError):
        check_ratios({"any": wrong})


def test_the_packages_data_is_of_known_words():
    check_ratios(read_ratios())
    assert json.loads(backend_choice.RATIOS_FILE.read_text()) == read_ratios()


def test_it_is_said_once_which_and_why(monkeypatch, caplog):
    choice = Choice(EAGER, "for a test that says it once")
    monkeypatch.setattr(backend_choice, "choose_backend", lambda *_: choice)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with kq.Engine.load("sprites", backend="auto") as engine:
                assert engine.backend == EAGER
    assert [record.message for record in caplog.records] == [
        "back end eager: for a test that says it once"
    ]


def test_the_engine_takes_what_was_chosen(monkeypatch):
    import kinetiq.engine as module

    monkeypatch.setattr(module, "take_backend", lambda *_: "openvino")
    asked = []

    def load(backend, checkpoint, network, trust):
        asked.append((backend, checkpoint.name, network, trust))
        return "a denoiser"

    monkeypatch.setattr(module, "load_exported", load)
    engine = kq.Engine.load("sprites", backend="auto")
    assert (engine.backend, engine.denoiser) == ("openvino", "a denoiser")
    assert asked == [("openvino", "sprites", None, ())]


def test_auto_chooses_no_network_for_a_file():
    assert "auto" not in BACKENDS
    with pytest.raises(RequestError, match=r"^load: network needs a backend .*, got 'auto'$"):
        kq.Engine.load("/no/such/folder", backend="auto", network="net.onnx")
