"""Back ends behind `Engine.load`: the same requests, with the same results."""

import ast
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import threading
import time
import types
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from exported import TAP, small_checkpoint, small_overrides
from tiny import write_tiny_folder

import kinetiq as kq

pytest.importorskip("onnx", reason="the extra 'export' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")

from kinetiq.backends import BACKENDS, EXPORTED, ON_GPU  # noqa: E402
from kinetiq.errors import (  # noqa: E402
    CheckpointError,
    InputError,
    MissingDependencyError,
    OutputError,
    RequestError,
    WorkError,
)
from kinetiq.export import (  # noqa: E402
    cache_key,
    engine_rtx,
    graph,
    loading,
    network,
    onnxruntime_denoiser,
)
from kinetiq.export.cache_key import code_key, options_key  # noqa: E402
from kinetiq.export.engine_file import NotVouchedForError, engine_folder  # noqa: E402
from kinetiq.export.engine_profile import Bounds  # noqa: E402
from kinetiq.export.gpu import Gpu  # noqa: E402
from kinetiq.export.nodes import KINDS  # noqa: E402
from kinetiq.export.onnxruntime_denoiser import OnnxruntimeDenoiser  # noqa: E402
from kinetiq.export.openvino_denoiser import OpenvinoDenoiser  # noqa: E402
from kinetiq.export.plugin_choice import PluginChoice  # noqa: E402
from kinetiq.export.specialisation import keep_controls  # noqa: E402
from kinetiq.export.specialising_denoiser import explained  # noqa: E402
from kinetiq.families import SiteKind  # noqa: E402
from kinetiq.files import replacing  # noqa: E402
from kinetiq.generation import is_out_of_memory  # noqa: E402
from kinetiq.motion_embedding import site_size  # noqa: E402
from kinetiq.motion_file import MotionInfo  # noqa: E402

SHAPE = {"frames": 4, "height": 16, "width": 16, "steps": 3}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kinetiq" / "exports"


def test_a_model_is_exported_once_and_read_from_the_cache(cache, exported, monkeypatch, caplog):
    checkpoint = small_checkpoint("animatediff")
    made = []

    def export(source, path, **options):
        made.append(options)
        shutil.copy(exported(), path)

    monkeypatch.setattr(loading, "DEFAULT_TAP", TAP)  # which the tests' own exports have
    monkeypatch.setattr(loading, "export_onnx", export)
    first = loading.load_denoiser("onnxruntime", checkpoint)
    second = loading.load_denoiser("openvino", checkpoint)
    assert isinstance(first, OnnxruntimeDenoiser) and isinstance(second, OpenvinoDenoiser)
    assert made == [{"tap": TAP}]
    (kept,) = cache.glob("*.onnx")
    assert kept.name == f"{checkpoint.fingerprint[:20]}-float32-opset23-{code_key()}.onnx"
    kept.write_bytes(kept.read_bytes()[:-10])
    loading.load_denoiser("onnxruntime", checkpoint)
    assert len(made) == 2
    assert f"making {kept} again, since it cannot be used: network {kept}: " in caplog.text
    monkeypatch.setattr(loading, "export_onnx", lambda *_, **__: kept.write_bytes(b"no"))
    kept.write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"^network .*\.onnx: "):  # once is enough
        loading.load_denoiser("onnxruntime", checkpoint)


def test_another_network_under_the_name_of_the_cache_is_made_again(
    cache, exported, monkeypatch, tmp_path
):
    """Whatever has put it there: it would compute in another type, or lose controls."""
    checkpoint = small_checkpoint("animatediff")
    made = []

    def export(source, path, **_):
        made.append(path)
        shutil.copy(exported(), path)

    monkeypatch.setattr(loading, "DEFAULT_TAP", TAP)
    monkeypatch.setattr(loading, "export_onnx", export)
    loading.load_denoiser("onnxruntime", checkpoint)
    (kept,) = cache.glob("*.onnx")
    bare = tmp_path / "bare.onnx"
    network.export_onnx(checkpoint, bare, controls=())
    for other in (exported(precision="float16"), bare):
        shutil.copy(other, kept)
        made.clear()
        denoiser = loading.load_denoiser("onnxruntime", checkpoint)
        assert made == [kept]
        assert denoiser.metadata.precision == "float32"
        assert set(denoiser.metadata.controls) == set(KINDS)


LATENT = 8  # a side of the clips below
SMALL = {"steps": 2, "frames": 4, "height": 16, "width": 16, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model"
    return write_tiny_folder(path, unet_overrides=small_overrides("animatediff"))


def learned(engine, seed, **switches):
    """An embedding at all temporal sites."""
    generator = torch.Generator().manual_seed(seed)
    sites = [site for site in engine.denoiser.sites if site.kind is SiteKind.TEMPORAL]
    return kq.MotionEmbedding(
        query_key={
            site.name.rpartition(".")[0]: 0.5 * torch.randn(4, site.width, generator=generator)
            for site in sites
        },
        value={
            site.name: 0.5
            * torch.randn(
                *(4, *site_size(engine.checkpoint.unet, site.name, (LATENT, LATENT)), site.width),
                generator=generator,
            )
            for site in sites
        },
        info=MotionInfo(
            kind="embedding", family="animatediff", frames=4, height=LATENT, width=LATENT
        ),
        **switches,
    )


def low_rank(engine, seed, **switches):
    """A LoRA of all projections of the temporal sites."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        f"{site.name}.{part}": site.width
        for site in engine.denoiser.sites
        for part in ("to_q", "to_k", "to_v", "to_out.0")
        if site.kind is SiteKind.TEMPORAL
    }
    return kq.MotionLora(
        {p: torch.randn(2, width, generator=generator) / width for p, width in shapes.items()},
        {p: torch.randn(width, 2, generator=generator) for p, width in shapes.items()},
        info=MotionInfo(kind="lora", family="animatediff", frames=4, height=LATENT, width=LATENT),
        **switches,
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_motions_and_injections_reach_an_exported_network(
    backend, small_folder, tmp_path_factory, monkeypatch
):
    """In one batch, to 1e-4, and none of them is lost: each changes what comes out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "small-cache"))
    moving = np.zeros((4, 16, 16, 3), np.uint8)
    moving[range(4), :, range(0, 16, 4)] = 255
    reference = kq.Clip.from_array(moving)
    with kq.Engine.load(small_folder) as eager:
        one = learned(eager, 1)
        controls = [
            None,
            one,
            attrs.evolve(one, query_key={}, debias="drop"),
            low_rank(eager, 2),
            low_rank(eager, 3, highway="all"),
            [one, low_rank(eager, 2)],
            [one, kq.QueryInjection(reference, until=1.0)],
            kq.MotionInjection(reference),
            kq.QueryInjection(reference, sites="both", reduce_leak=True, until=1.0),
        ]
        requests = [kq.Request("a ring", control=control, **SMALL) for control in controls]
        expected = list(eager.generate_latents(requests))
    with kq.Engine.load(small_folder, backend=backend) as engine:
        got = list(engine.generate_latents(requests))
    for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
        # An embedding whose values are dropped, and which has nothing else, moves nothing.
        still = (theirs - expected[0]).abs().max() <= 1e-4 * expected[0].abs().max()
        assert still == (place in (0, 2))


def test_who_wants_what_another_makes_waits_for_it(cache, caplog):
    path, made, used = cache / "a.onnx", [], []
    cache.mkdir(parents=True)

    def make():
        made.append(path)
        time.sleep(0.05)  # which the others spend before the lock
        path.touch()

    threads = [
        threading.Thread(target=loading._use_kept, args=(path, make, used.append)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (made, used) == ([path], [path] * 3)
    assert caplog.messages == [f"waiting for another process that makes {path}"] * 2


def lose(cache):
    """What a kill leaves, and what is none of it."""
    file, folder = cache / f".kinetiq-{'0a' * 8}.tmp", cache / ".kinetiq-ab_cd123"
    folder.mkdir(parents=True)
    for one in (file, folder / "net.onnx", cache / ".kinetiq-mine.tmp", cache / "net.onnx"):
        one.write_bytes(b"bytes")
    for one in (file, folder, cache / ".kinetiq-mine.tmp", cache / "net.onnx"):
        os.utime(one, (0, 0))
    return file, folder


def test_what_a_kill_leaves_is_removed_and_nothing_else(cache):
    lost, path = lose(cache), cache / "a.onnx"
    loading._use_kept(path, path.touch, lambda _: None)
    assert not any(one.exists() for one in lost)
    assert {one.name for one in cache.iterdir()} >= {".kinetiq-mine.tmp", "net.onnx", "a.onnx"}


def test_what_was_just_written_to_is_not_removed(cache):
    """It may be of an export that a user lets be written there by name."""
    path = cache / "a.onnx"
    cache.mkdir(parents=True)
    with replacing(cache / "mine.onnx") as temporary:
        temporary.write_bytes(b"bytes")
        loading._use_kept(path, path.touch, lambda _: None)
    assert (cache / "mine.onnx").read_bytes() == b"bytes"


def test_what_may_be_in_use_is_not_removed(cache):
    path, other = cache / "a.onnx", cache / "b.onnx"
    cache.mkdir(parents=True)
    begun, ended = threading.Event(), threading.Event()

    def work():
        begun.set()
        ended.wait(30)

    thread = threading.Thread(target=loading._use_kept, args=(other, work, lambda _: None))
    thread.start()
    assert begun.wait(30)
    lost = lose(cache)
    loading._use_kept(path, path.touch, lambda _: None)
    assert all(one.exists() for one in lost)
    ended.set()
    thread.join()
    path.unlink()
    loading._use_kept(path, path.touch, lambda _: None)
    assert not any(one.exists() for one in lost)


def test_the_names_of_what_is_written_before_its_turn_are_known(tmp_path, monkeypatch):
    seen = set()

    def look(*_):
        seen.update(one.name for one in tmp_path.iterdir() if one.name != "net.onnx")
        return ()

    monkeypatch.setattr(network, "outside_files", look)
    network.export_onnx(small_checkpoint("animatediff"), tmp_path / "net.onnx", controls=())
    assert len(seen) == 2
    assert all(loading._TEMPORARY.fullmatch(name) for name in seen)


def test_other_code_has_another_key(monkeypatch, tmp_path):
    assert re.fullmatch("[0-9a-f]{12}", code_key())
    code_key.cache_clear()
    keys = set()
    for version in ("1", "2"):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, version=version: version)
        keys.add(code_key())
        code_key.cache_clear()
    monkeypatch.setattr(cache_key, "__file__", str(tmp_path / "cache_key.py"))
    (tmp_path / "network.py").write_text("other")
    keys.add(code_key())
    code_key.cache_clear()
    (tmp_path / "launch.json").write_text("{}")
    monkeypatch.setenv("KINETIQ_LAUNCH", str(tmp_path / "launch.json"))
    keys.add(code_key())
    code_key.cache_clear()
    assert len(keys) == 4
    monkeypatch.setenv("KINETIQ_LAUNCH", str(tmp_path / "none.json"))
    with pytest.raises(InputError, match=r"none.json must be readable, .*: No such file.*; where"):
        code_key()
    assert options_key({"rows": Bounds(1, 2, 4)}) != options_key({"rows": Bounds(1, 2, 5)})


def test_all_that_the_graph_is_made_of_is_in_the_key():
    tree = ast.parse(Path(graph.__file__).read_text())
    read = {
        node.module.removeprefix("kinetiq.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kinetiq.")
    }
    own = {name for name in read if not name.startswith("export.")}
    assert own - {"errors"} == set(cache_key.ENGINE_MODULES)
    names = {path.name for path in cache_key.deciding_files()}
    assert {"graph.py", "frame_attention.py", "launch.json", "skips.py"} <= names
    assert "onnx-ir" in network.PACKAGES


def test_a_given_network_must_be_of_the_model(exported):
    other = small_checkpoint("unet3d")
    with pytest.raises(
        CheckpointError, match=r"must be an export of small-unet3d, fingerprint 0+, got"
    ):
        loading.load_denoiser("onnxruntime", other, network=exported())


def test_a_given_network_must_compute_in_the_type_of_the_model(exported, gpu):
    for dtype in ("bfloat16", "float16"):
        checkpoint = small_checkpoint("animatediff", dtype)
        for backend, path in (
            ("onnxruntime", exported()),
            ("openvino", exported()),
            ("tensorrt", Path("a.engine")),
        ):
            words = rf"its float32 must be the model's, got {dtype}; load the model with dtype 'flo"
            with pytest.raises(RequestError, match=words):
                loading.load_denoiser(backend, checkpoint, network=path)


def test_no_cpu_is_advised_to_load_a_model_in_float16(exported):
    network, checkpoint = exported(precision="float16"), small_checkpoint("animatediff")
    with pytest.raises(RequestError, match=r"must be the model's, got float32; export it in flo"):
        loading.load_denoiser("onnxruntime", checkpoint, network=network)
    on_gpu = types.SimpleNamespace(
        fingerprint=checkpoint.fingerprint, dtype=torch.float32, device=torch.device("cuda")
    )
    with pytest.raises(RequestError, match=r"got float32; load the model with dtype 'float16', or"):
        loading._require_same(on_gpu, loading.read_metadata(network), network)


def test_options_without_a_meaning_are_refused_before_anything_loads():
    with pytest.raises(RequestError, match=r"^load: network needs a backend that runs an exported"):
        kq.Engine.load("/no/such/folder", network="net.onnx")
    with pytest.raises(RequestError, match=r"^load: trust needs a backend"):
        kq.Engine.load("/no/such/folder", trust="00")
    checkpoint = small_checkpoint("animatediff", "bfloat16")
    with pytest.raises(
        RequestError, match=r"got bfloat16; take float32, or use backend='openvino'$"
    ):
        loading.load_denoiser("onnxruntime", checkpoint)
    with pytest.raises(RequestError, match=r"^load: trust is for engines of TensorRT"):
        loading.load_denoiser("openvino", checkpoint, trust="00")
    for backend in ON_GPU:
        with pytest.raises(RequestError, match=rf"^{backend}: the device must be a GPU, got cpu"):
            kq.Engine.load("/no/such/folder", backend=backend, device="cpu")
    assert set(EXPORTED) | {"eager", "compiled"} == set(BACKENDS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ON_GPU)
def test_without_a_gpu_an_engine_is_refused_before_anything_loads(backend, monkeypatch):
    module = backend.replace("-", "_")
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    words = rf"^{backend}: needs an NVIDIA GPU .*; run the network on a CPU with backend='onnxr"
    for options in ({}, {"device": "cuda"}, {"network": "net.engine"}):
        with pytest.raises(MissingDependencyError, match=words):
            kq.Engine.load("/no/such/folder", backend=backend, **options)
    with pytest.raises(RequestError, match=r"^device: must be 'cpu', 'cuda' or .*, got 'tpu'"):
        kq.Engine.load("/no/such/folder", backend=backend, device="tpu")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU for which engines can be built, but do not run; what was built, and opened."""
    builds, opened = [], []

    def build(network, path, *, bounds, outputs, target="the GPU at hand"):
        assert bounds == {"rows": Bounds(1, 2, 16)}
        assert outputs == ("prediction",)
        builds.append((network.name, path.name, target))
        path.write_bytes(b"plan")

    def open_engine(path, *, trust, device, runtime):
        opened.append((path.name, trust, runtime))
        checkpoint = small_checkpoint("animatediff")
        return types.SimpleNamespace(
            metadata=types.SimpleNamespace(
                fingerprint=checkpoint.fingerprint,
                checkpoint=checkpoint.name,
                precision="float32",
            )
        )

    package = types.SimpleNamespace(__version__="1.7")
    monkeypatch.setattr(loading, "require_gpu", lambda *_: package)
    monkeypatch.setattr(loading, "find_gpu", lambda: "sm_89")
    monkeypatch.setattr(loading, "describe_gpu", lambda: Gpu("a GPU", 76))
    monkeypatch.setattr(
        engine_rtx, "targets", lambda given: {"sm_89": 1} if given is package else {}
    )
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(loading, "build_engine", build)
    monkeypatch.setattr(loading, "build_rtx_engine", build)
    monkeypatch.setattr(loading, "open_engine", open_engine)
    return types.SimpleNamespace(package=package, builds=builds, opened=opened)


def test_an_engine_is_built_once_for_a_gpu_and_a_version(cache, gpu, exported, monkeypatch):
    checkpoint = small_checkpoint("animatediff")
    monkeypatch.setattr(loading, "export_onnx", lambda _, path, **__: shutil.copy(exported(), path))
    for _ in range(2):
        loading.load_denoiser("tensorrt", checkpoint)
    stem = f"{checkpoint.fingerprint[:20]}-float32"
    network = f"{stem}-opset23-{code_key()}.onnx"
    ((_, engine, _),) = gpu.builds
    assert engine.startswith(f"{stem}-tensorrt-1.7-sm_89-{code_key()}-")
    assert gpu.builds == [(network, engine, "the GPU at hand")]
    assert gpu.opened == [(engine, (), "tensorrt")] * 2
    assert (cache.parent / "engines" / engine).exists()
    gpu.package.__version__ = "1.8"
    loading.load_denoiser("tensorrt-rtx", checkpoint, trust="00")
    assert gpu.builds[1][::2] == (network, "sm_89")
    assert gpu.builds[1][1].startswith(f"{stem}-tensorrt-rtx-1.8-sm_89-{code_key()}-")
    assert gpu.opened[-1][1:] == ("00", "tensorrt-rtx")
    with pytest.raises(CheckpointError, match="must be an export of small-unet3d"):
        loading.load_denoiser("tensorrt", small_checkpoint("unet3d"), network=Path("a.engine"))
    assert len(gpu.builds) == 2
    # Other nodes that run our kernels are another engine.
    gpu.package.__version__ = "1.7"
    monkeypatch.setattr(loading, "choose_by_record", lambda _: PluginChoice((), None))
    loading.load_denoiser("tensorrt", checkpoint)
    assert gpu.builds[2][1] != engine
    # So is one for another model of the architecture, but not where no GPU is timed.
    monkeypatch.setattr(loading, "describe_gpu", lambda: Gpu("a smaller GPU", 20))
    loading.load_denoiser("tensorrt", checkpoint)
    assert len({path for _, path, _ in gpu.builds}) == 4
    gpu.package.__version__ = "1.8"
    loading.load_denoiser("tensorrt-rtx", checkpoint)
    assert len(gpu.builds) == 4
    # What TensorRT for RTX does not build for is refused before a model is exported.
    monkeypatch.setattr(loading, "find_gpu", lambda: "sm_90")
    monkeypatch.setattr(loading, "export_onnx", None)
    shutil.rmtree(cache)
    with pytest.raises(RequestError, match="TensorRT for RTX builds for sm_89, got 'sm_90'"):
        loading.load_denoiser("tensorrt-rtx", checkpoint)


def test_an_engine_that_is_broken_is_built_again_once(cache, gpu, exported, monkeypatch, caplog):
    checkpoint = small_checkpoint("animatediff")
    monkeypatch.setattr(loading, "export_onnx", lambda _, path, **__: shutil.copy(exported(), path))
    open_engine, broken = loading.open_engine, [CheckpointError("a checksum is wrong")]

    def open_once(path, **options):
        if broken:
            raise broken.pop()
        return open_engine(path, **options)

    monkeypatch.setattr(loading, "open_engine", open_once)
    loading.load_denoiser("tensorrt", checkpoint)
    assert len(gpu.builds) == 2
    assert "again, since it cannot be used: a checksum is wrong" in caplog.text
    broken += [CheckpointError("no")] * 2
    with pytest.raises(CheckpointError, match="no"):
        loading.load_denoiser("tensorrt", checkpoint)
    broken += [CheckpointError("no")]
    with pytest.raises(CheckpointError, match="no"):  # what the caller names is not ours to build
        loading.load_denoiser("tensorrt", checkpoint, network=Path("a.engine"))
    assert len(gpu.builds) == 3


def test_what_no_build_can_mend_is_not_built(cache, gpu, exported, monkeypatch):
    checkpoint = small_checkpoint("animatediff")
    monkeypatch.setattr(loading, "export_onnx", lambda _, path, **__: shutil.copy(exported(), path))
    folder = engine_folder()
    folder.mkdir(parents=True, mode=0o700)
    folder.chmod(0o775)
    with pytest.raises(OutputError, match=rf"must be a folder that you own .*; chmod 700 {folder}"):
        loading.load_denoiser("tensorrt", checkpoint)
    assert not gpu.builds
    folder.chmod(0o700)
    error = NotVouchedForError("nobody vouches for it")
    monkeypatch.setattr(loading, "open_engine", lambda *_, **__: (_ for _ in ()).throw(error))
    for _ in range(2):
        with pytest.raises(NotVouchedForError):
            loading.load_denoiser("tensorrt", checkpoint)
    assert len(gpu.builds) == 1


def test_a_missing_package_is_named_with_its_command(monkeypatch, exported):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name)
    )
    with pytest.raises(
        MissingDependencyError, match=r'needs openvino, .*: pip install "\.\[export\]"$'
    ):
        OpenvinoDenoiser(exported())
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(
        MissingDependencyError,
        match=r"CUDAExecutionProvider must be there for cuda.*: pip uninstall -y onnxruntime && pip",
    ):
        OnnxruntimeDenoiser(exported(), "cuda")


def test_cuda_multiplies_float32_in_all_its_bits():
    name, options = onnxruntime_denoiser.provider_of(torch.device("cuda", 1))
    assert name == "CUDAExecutionProvider"
    assert options["device_id"] == 1 and options["use_tf32"] == 0
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert onnxruntime_denoiser.provider_of(torch.device("cpu")) == ("CPUExecutionProvider", {})


def test_a_provider_that_cannot_be_loaded_is_not_another_in_silence():
    calls = []
    session = types.SimpleNamespace(
        get_providers=lambda: ["CPUExecutionProvider"],
        disable_fallback=lambda: calls.append("disabled"),
    )
    onnxruntime_denoiser.check_session(session, torch.device("cpu"))
    with pytest.raises(
        MissingDependencyError,
        match=r"CUDAExecutionProvider must be usable for cuda, .* took CPU.*; install the CUDA and",
    ):
        onnxruntime_denoiser.check_session(session, torch.device("cuda"))
    assert calls == ["disabled"] * 2


@pytest.mark.parametrize(
    "words",
    [
        "Failed to allocate memory for requested buffer of size 8",
        "Available memory of 4 is smaller than requested bytes of 8",
        "CUDA failure 2: out of memory ; GPU=0",
        "std::bad_alloc",
    ],
)
def test_memory_that_runs_out_splits_the_batch(words):
    cuda = torch.device("cuda")
    error = explained(RuntimeError(words), "onnxruntime", "run", cuda)
    assert is_out_of_memory(error) and words in str(error)
    assert is_out_of_memory(explained(MemoryError(), "openvino", "run", cuda))
    error = explained(RuntimeError("a shape"), "onnxruntime", "run", cuda)
    assert type(error) is WorkError and "onnxruntime: must run, and failed: a shape" in str(error)
    said = "Exception from src/a.cpp:1:\nCheck 'b' failed at src/c.cpp:2:\nNo rule for Norm\n\n"
    error = explained(RuntimeError(said), "openvino", "run", cuda)
    assert str(error) == "openvino: must run, and failed: No rule for Norm"


@pytest.mark.parametrize("runtime", [OnnxruntimeDenoiser, OpenvinoDenoiser])
def test_what_a_runtime_refuses_is_said_in_its_words(exported, runtime):
    denoiser = runtime(exported())
    latents, text = torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 5, 3)
    inputs = {"latents": latents, "timesteps": torch.ones(1), "text": text}
    name = denoiser._where
    with pytest.raises(WorkError, match=rf"^{name}: must run the network on inputs of latents \["):
        denoiser.run(inputs, frozenset(), "prediction")
    plain = keep_controls(denoiser._model, (), outputs=("prediction",))
    with pytest.raises(WorkError, match=rf"^{name}: must run a variant of the network, and failed"):
        denoiser.run_model(plain, inputs)
    plain.graph.node[0].op_type = "Unheard"
    with pytest.raises(
        WorkError, match=rf"^{name}: must take the network, and failed: (?!Exception from)"
    ):
        denoiser.run_model(plain, inputs)


def test_memory_that_runs_out_under_openvino(exported, monkeypatch):
    denoiser = OpenvinoDenoiser(exported())
    program = types.SimpleNamespace(start=lambda _: (_ for _ in ()).throw(MemoryError("bad")))
    monkeypatch.setattr(denoiser, "program", lambda *_: program)
    with pytest.raises(torch.OutOfMemoryError, match=r"in the memory of cpu, .* not suffice: bad"):
        denoiser.run({"latents": torch.zeros(1, 4, 2, 4, 4)}, frozenset(), "prediction")


def test_openvino_is_for_cpus(exported):
    with pytest.raises(RequestError, match=r"^openvino: device must be cpu, got cuda"):
        OpenvinoDenoiser(exported(), "cuda")


def test_what_needs_the_network_itself_is_refused_by_request(tmp_path):
    folder = write_tiny_folder(tmp_path / "model")
    with kq.Engine.load(folder) as eager:
        engine = kq.Engine(eager.checkpoint, eager.denoiser, backend="onnxruntime")
        guided = kq.Request("a red circle", control=kq.MoftGuidance(direction="left"), **SHAPE)
        results = list(engine.generate_many([guided], on_error="return"))
    assert "backend must be 'eager' for MoftGuidance, which needs gradients" in str(results[0])


def test_a_size_that_no_exported_network_takes_is_refused_before_it_is_run(tmp_path, exported):
    with kq.Engine.load(write_tiny_folder(tmp_path / "model")) as eager:
        sizes = {"height": 18, "width": 16}
        eager.resolve(kq.Request("a ring", **sizes))
        engine = kq.Engine(eager.checkpoint, OnnxruntimeDenoiser(exported()), backend="onnxruntime")
        words = (
            r"^height: must be a multiple of 4 for model on onnxruntime, got 18; or load the "
            r"model with backend='eager'$"
        )
        with pytest.raises(RequestError, match=words):
            engine.resolve(kq.Request("a ring", **sizes))


def sprites(backend, dtype="float32"):
    return kq.Engine.load("sprites", backend=backend, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_clips_of_the_embedded_model_agree_with_eager(backend, tmp_path_factory, monkeypatch):
    """A generated latent errs by at most 1e-4; plain and injected, guided, in one batch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    with sprites("eager") as eager:
        reference = eager.generate("a blue square moving right", seed=3, steps=8)
        requests = [
            kq.Request("a red circle", seed=1, steps=8),
            kq.Request("a green ring", seed=2, steps=8, control=kq.QueryInjection(reference)),
            kq.Request("a red square", seed=4, steps=8, control=kq.MotionInjection(reference)),
        ]
        expected = list(eager.generate_latents(requests))
    with sprites(backend) as engine:
        got = list(engine.generate_latents(requests))
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
