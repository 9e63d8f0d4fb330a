"""The bench of exported networks: what its figures mean, and that a tiny model goes all the way."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import exported
import pytest
import tiny
import torch

pytest.importorskip("onnx", reason="the extra 'export' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
pytest.importorskip("openvino", reason="the extra 'export' is not installed")

from kinetiq.bench import export
from kinetiq.bench.figures import Figure, load_targets
from kinetiq.bench.harness import BENCHES, BenchOptions, Progress
from kinetiq.bench.measure import PeakMemory
from kinetiq.bench.subjects import FullSize
from kinetiq.engine import Engine
from kinetiq.errors import WorkError
from kinetiq.motion_injection import MotionInjection
from kinetiq.query_injection import QueryInjection
from kinetiq.sprites.cases import transfer_pairs

SMALL = exported._SMALL["animatediff"]
SAMPLE = export.Sample(("float32",), steps=2, repeats=1, whole=False)
OF_TARGETS = (
    {"export.seconds", "export.full_size.seconds", "export.full_size.peak_gigabytes"}
    | {f"export.{runtime}_fp32.latent_error" for runtime in export.RUNTIMES}
    | {f"export.{name}.error_ratio" for name in ("onnxruntime_fp16", "openvino_fp16")}
    | {"export.openvino_bf16.error_ratio"}
    | {"export.onnxruntime_fp32.ratio", "export.openvino_bf16.ratio"}
    | {f"export.attentions_fused.{target}" for target in export.TARGETS}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose clips are small by default."""
    path = tiny.write_tiny_folder(tmp_path_factory.mktemp("export") / "model", unet_overrides=SMALL)
    sizes = {"frames": 3, "height": 16, "width": 16, "steps": 2}
    (path / "kinetiq.json").write_text(json.dumps(sizes))
    return path


@pytest.fixture
def full_size():
    config = tiny._ANIMATEDIFF | SMALL
    return FullSize("tiny", "animatediff", config, (5, tiny.CROSS_WIDTH), 3, 16, 16)


def answers(*latents, prediction=0.0):
    return export.Answers(list(map(torch.tensor, latents)), torch.tensor([1.0, prediction]))


@pytest.mark.slow
def test_a_tiny_model_goes_through_every_runtime(folder, tmp_path):
    figures = export.embedded_figures(folder, SAMPLE, tmp_path, Progress())
    timed = ("embedded", *(f"embedded.threads_{count}" for count in export.thread_counts()))
    assert set(figures) == {"export.seconds"} | {
        name
        for runtime in export.RUNTIMES
        for name in (
            f"export.{runtime}_fp32.latent_error",
            *(f"export.{part}.{runtime}_fp32.ratio" for part in timed),
        )
    }
    for runtime in export.RUNTIMES:
        error = figures[f"export.{runtime}_fp32.latent_error"]
        assert 0 < error.value <= 1e-4 and error.n == 6
        assert figures[f"export.embedded.{runtime}_fp32.ratio"].value > 0
    assert export.network_file(tmp_path, "float32").exists()


@pytest.mark.slow
def test_a_tiny_model_goes_through_the_parts_of_full_size(full_size):
    figures = export.full_size_figures(full_size, Progress())
    names = ("onnxruntime_fp32", "openvino_fp32", "openvino_bf16")
    parts = ("", *(f"threads_{count}." for count in export.thread_counts()))
    assert set(figures) == {f"export.{part}{name}.ratio" for part in parts for name in names}
    cost = export.full_size_cost(full_size)
    assert cost["export.full_size.seconds"].value > 0
    assert 0.1 < cost["export.full_size.peak_gigabytes"].value < 10  # PyTorch, and little more


OFF = {
    ("eager", "float32"): 0.0,
    ("eager", "float16"): 1e-3,
    ("eager", "bfloat16"): 1e-2,
    ("onnxruntime", "float32"): 1e-5,
    ("onnxruntime", "float16"): 5e-4,
    ("openvino", "float32"): 2e-5,
    ("openvino", "float16"): 1e-3,
    ("openvino", "bfloat16"): 1.5e-2,
}


BY_WORD = {word: precision for precision, word in export.WORDS.items()}


class MadeUp:
    """An engine whose clips and predictions are off as its precision and its runtime are."""

    loaded = ()  # a list of the test under way

    def __init__(self, precision, runtime):
        self.off_by = OFF[runtime, precision]
        self.checkpoint = SimpleNamespace(dtype=getattr(torch, precision))
        self.denoiser = self

    @classmethod
    def load(cls, source, precision, backend="eager", network=None):
        cls.loaded.append((source, precision, backend, network and network.name))
        return cls(precision, backend)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def generate_latents(self, batch):
        for request in batch:
            yield torch.tensor([1.0 + request.seed, 0.0]) * (1.0 + self.off_by)

    def predict(self, latents, _, text, controls):
        assert controls is export.NO_CONTROLS
        assert latents.dtype is text.dtype is self.checkpoint.dtype
        return latents.float() * (1.0 + self.off_by)


def test_every_type_is_judged_by_eagers_own_error(monkeypatch, tmp_path):
    monkeypatch.setattr(MadeUp, "loaded", [])
    monkeypatch.setattr(export, "load_engine", MadeUp.load)
    opened = {
        name: lambda network, name=name: MadeUp(BY_WORD[network.stem[-4:]], name)
        for name in export.RUNTIMES
    }
    monkeypatch.setattr(export, "RUNTIMES", opened)
    monkeypatch.setattr(export, "thread_counts", lambda: (1, 2))
    monkeypatch.setattr(export, "embedded_step", lambda _: export.Step(*torch.ones(2, 2, 3)))
    monkeypatch.setattr(export, "time_export", lambda engine, _: 1e4 * engine.off_by + 7.0)
    figures = export.embedded_figures("model", export.FULL, tmp_path, Progress())
    value = {name: figure.value for name, figure in figures.items()}
    rounding = {"abs": 2e-7}  # of float32 clips
    assert value["export.seconds"] == 7.0  # of float32
    assert value["export.onnxruntime_fp32.latent_error"] == pytest.approx(1e-5, **rounding)
    assert value["export.openvino_fp32.latent_error"] == pytest.approx(2e-5, **rounding)
    assert value["export.onnxruntime_fp16.error_ratio"] == pytest.approx(0.5, rel=1e-3)
    assert value["export.openvino_fp16.error_ratio"] == pytest.approx(1.0, rel=1e-3)
    assert value["export.openvino_bf16.error_ratio"] == pytest.approx(1.5, rel=1e-3)
    timed = ("onnxruntime_fp32", "openvino_fp32", "onnxruntime_fp16", "openvino_fp16")
    for name in (*timed, "openvino_bf16"):
        of_threads = [figures[f"export.embedded.threads_{n}.{name}.ratio"] for n in (1, 2)]
        assert figures[f"export.embedded.{name}.ratio"] == max(of_threads, key=lambda f: f.value)
        assert {figure.n for figure in of_threads} == {export.FULL.repeats}
    assert len(figures) == 1 + (1 + 3) * 5
    assert MadeUp.loaded[1:4] == [
        ("model", "float32", "eager", None),
        ("model", "float32", "onnxruntime", "embedded-fp32.onnx"),
        ("model", "float32", "openvino", "embedded-fp32.onnx"),
    ]
    assert MadeUp.loaded[-1] == ("model", "bfloat16", "openvino", "embedded-bf16.onnx")
    monkeypatch.setitem(OFF, ("openvino", "bfloat16"), 0.1)
    with pytest.raises(WorkError, match="openvino_bf16: our network must err at most"):
        export.embedded_figures("model", export.FULL, tmp_path, Progress())


def test_clips_are_alone_and_mixed_and_every_control_acts(folder):
    batches = export.make_batches(transfer_pairs(1)[0].reference(), steps=2)
    kinds = [[type(clip.control[0]) if clip.control else None for clip in b] for b in batches]
    assert kinds[3] == [None, QueryInjection, MotionInjection]
    assert kinds[:3] == [[kind] for kind in kinds[3]]
    assert len({clip.seed for clip in batches[3]}) == 3
    with Engine.load(folder) as engine:
        step = export.embedded_step(engine)
        found = export.answer(engine, batches[:3], step)
        assert step.latents.shape == (2, 4, 3, 8, 8) and step.text.shape[0] == 2
        assert not torch.equal(step.text[0], step.text[1])
        torch.testing.assert_close(step.latents[0], step.latents[1], rtol=0, atol=0)
    plain, query, motion = found.latents
    assert export.worst_error([query], [plain]) > 0.01
    assert export.worst_error([motion], [plain]) > 0.01
    assert found.prediction.shape == step.latents.shape


def test_errors_are_of_the_worst_clip_by_its_largest_value():
    exact = answers([4.0, -8.0], [1.0, 2.0])
    ours = answers([4.0, -8.0], [1.0, 2.5])
    (error,) = export.error_figures("x_fp32", ours, exact, exact).items()
    assert error == ("export.x_fp32.latent_error", Figure(0.25, n=2))
    usual = answers([3.0, -8.0], [1.0, 2.0])
    (ratio,) = export.error_figures("x_bf16", ours, usual, exact).items()
    assert ratio == ("export.x_bf16.error_ratio", Figure(2.0, n=2))
    with pytest.raises(WorkError, match="eager must err in the type of x_bf16, errs 0"):
        export.error_figures("x_bf16", ours, answers([4.0, -8.0], [1.0, 2.0]), exact)
    broken = answers([float("nan"), 0.0], [1.0, 2.0])
    assert export.worst_error(broken.latents, exact.latents) != 0.25
    assert not export.worst_error(broken.latents, exact.latents) <= 1.0


def test_a_runtime_without_a_type_is_left_out_in_words(capsys):
    assert export.supported_runtimes("bfloat16") == ("openvino",)
    assert "onnxruntime is left out, since it runs no bfloat16" in capsys.readouterr().out
    assert export.supported_runtimes("float16") == ("onnxruntime", "openvino")
    assert not capsys.readouterr().out


class Network:
    """A denoiser that is off by a part of the largest value, and says who was asked."""

    def __init__(self, name, off, asked, threads):
        self.name, self.off, self.asked = name, off, asked
        threads.append((name, torch.get_num_threads()))

    def predict(self, latents, timesteps, text, controls):
        assert controls is export.NO_CONTROLS
        assert len(latents) == len(timesteps) == len(text)
        self.asked.append((self.name, latents.dtype))
        scale = latents.float().abs().max()
        return (latents.float() + self.off * scale).to(latents.dtype)


@pytest.fixture
def networks(monkeypatch, full_size):
    """Full-size networks that are made up: how far off each is, and who was asked."""
    off = {"onnxruntime": 1e-5, "openvino": 2e-5}
    asked, exports, threads = [], [], []
    monkeypatch.setattr(export, "thread_counts", lambda: (1, 2))

    def subject(model, device, dtype):
        assert model is full_size and device == "cpu"
        return SimpleNamespace(
            engine=SimpleNamespace(denoiser=Network("eager", 0.0, asked, threads))
        )

    def write(engine, path):
        path.write_bytes(b"network")
        exports.append(path)
        return SimpleNamespace(path=path)

    def open_as(name):
        def load(path):
            assert path.read_bytes() == b"network"
            return Network(name, off[name], asked, threads)

        return load

    monkeypatch.setattr(export, "full_size_subject", subject)
    monkeypatch.setattr(export, "export_onnx", write)
    monkeypatch.setattr(export, "RUNTIMES", {name: open_as(name) for name in off})
    return SimpleNamespace(
        off=off, asked=asked, exports=exports, threads=threads, before=torch.get_num_threads()
    )


def test_the_full_size_step_is_checked_and_timed_in_turn(networks, full_size):
    figures = export.full_size_figures(full_size, Progress())
    names = ("onnxruntime_fp32", "openvino_fp32", "openvino_bf16")
    parts = ("", "threads_1.", "threads_2.")
    assert set(figures) == {f"export.{part}{name}.ratio" for part in parts for name in names}
    assert {figure.n for figure in figures.values()} == {3}
    assert not any(path.exists() for path in networks.exports) and len(networks.exports) == 2
    wide, narrow = torch.float32, torch.bfloat16
    expected = [("eager", wide)]
    for name in ("onnxruntime", "openvino"):
        expected += ([(name, wide)] + [(name, wide), ("eager", wide)] * 3) * 2
    expected += [("eager", narrow)]
    expected += ([("openvino", narrow)] + [("openvino", narrow), ("eager", narrow)] * 3) * 2
    assert networks.asked == expected
    threads = {(name, count) for name, count in networks.threads if name != "eager"}
    assert threads == {(name, count) for name in networks.off for count in (1, 2)}
    assert torch.get_num_threads() == networks.before


def test_a_step_that_is_wrong_is_not_timed(networks, full_size):
    networks.off["openvino"] = 2e-4
    with pytest.raises(WorkError, match="openvino_fp32: our network must err at most"):
        export.full_size_figures(full_size, Progress())
    assert networks.asked[-1][0] == "openvino"  # once


def test_the_cost_of_an_export_is_of_a_process_of_its_own(monkeypatch, full_size):
    written = []

    def peak(prepare, run):
        assert pickle.dumps((prepare, run))  # as they travel to another process
        checkpoint = prepare()
        assert checkpoint.unet.dtype is torch.float16 and not checkpoint.unet.training
        run(checkpoint)
        return PeakMemory(1, 4_500_000_000)

    monkeypatch.setattr(export.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(export, "peak_memory", peak)
    monkeypatch.setattr(export, "export_onnx", lambda _, path: written.append(path))
    monkeypatch.setattr(export.time, "perf_counter", iter((10.0, 12.5)).__next__)
    assert export.full_size_cost(full_size) == {
        "export.full_size.seconds": Figure(2.5, n=1, unit="s"),
        "export.full_size.peak_gigabytes": Figure(4.5, n=1, unit="GB"),
    }
    assert not written[0].parent.exists()


def test_the_full_size_engine_is_built_from_the_same_export(monkeypatch, full_size):
    fused = [74]

    def peak(prepare, run):
        state = prepare()
        run(state)
        return PeakMemory(1, 9_000_000_000 if isinstance(state, Path) else 4_500_000_000)

    def build(network, path, *, target):
        assert network.read_bytes() == b"network" and target == "sm_89"
        return SimpleNamespace(record=SimpleNamespace(fused=fused[0], attentions=74))

    monkeypatch.setattr(export.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(export, "peak_memory", peak)
    monkeypatch.setattr(export, "random_checkpoint", lambda *_: "a checkpoint")
    monkeypatch.setattr(export, "export_onnx", lambda _, path: path.write_bytes(b"network"))
    monkeypatch.setattr(export, "build_rtx_engine", build)
    figures = export.full_size_cost(full_size)
    assert figures["export.full_size.peak_gigabytes"].value == 4.5
    assert figures["export.full_size.engine_peak_gigabytes"].value == 9.0
    assert figures["export.full_size.engine_seconds"].value >= 0
    assert figures["export.full_size.attentions_fused"] == Figure(1.0, n=74)
    fused[0] = None
    with pytest.raises(WorkError, match=r"for sm_89 at full size must say .* got None of 74"):
        export.full_size_cost(full_size)


def test_fused_attentions_are_those_of_the_worse_type(monkeypatch, tmp_path):
    fused = {"sm_80": (4, 4), "sm_86": (3, 4), "sm_89": (4, 1), "sm_120": (4, 4)}
    built = []

    def build(network, path, *, target):
        number = [export.network_file(tmp_path, t) for t in export.FUSED_IN].index(network)
        path.write_bytes(b"plan")
        built.append((target, path))
        return SimpleNamespace(record=SimpleNamespace(fused=fused[target][number], attentions=4))

    monkeypatch.setattr(export, "build_rtx_engine", build)
    figures = export.fused_figures(tmp_path, Progress())
    assert {name.rpartition(".")[2]: f.value for name, f in figures.items()} == {
        "sm_80": 1.0,
        "sm_86": 0.75,
        "sm_89": 0.25,
        "sm_120": 1.0,
    }
    assert len(built) == 8 and not any(path.exists() for _, path in built)
    fused["sm_86"] = (None, 4)
    with pytest.raises(WorkError, match=r"for sm_86 in float16 must say .* got None of 4"):
        export.fused_figures(tmp_path, Progress())


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("rtx", [True, False])
def test_what_is_measured(monkeypatch, quick, rtx):
    samples = []

    def embedded(source, sample, folder, progress):
        assert source == "sprites" and folder.is_dir()
        samples.append(sample)
        return {"export.seconds": Figure(1.0)}

    monkeypatch.setattr(export, "embedded_figures", embedded)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda _: object() if rtx else None)
    for name in ("fused_figures", "full_size_cost", "full_size_figures"):
        part = {f"export.{name}": Figure(1.0)}
        monkeypatch.setattr(export, name, lambda *_, part=part: part)
    figures = export.measure(BenchOptions(quick=quick), Progress())
    expected = {"export.seconds"}
    if not quick:
        expected |= {"export.full_size_cost", "export.full_size_figures"}
        expected |= {"export.fused_figures"} if rtx else set()
    assert set(figures) == expected
    (sample,) = samples
    assert sample.precisions[0] == "float32"
    assert quick or {*export.FUSED_IN} <= {*sample.precisions}


def test_the_bench_is_listed_and_its_targets_are_its_figures():
    assert BENCHES.load("export") is export.BENCH
    assert {name for name in load_targets() if name.startswith("export.")} == OF_TARGETS
