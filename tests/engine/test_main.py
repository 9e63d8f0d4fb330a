"""The command line, as a user meets it: in process where that will do, as a process where not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import attrs
import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from kinetiq import __main__ as command_line
from kinetiq import clip as clip_module
from kinetiq import files as files_module
from kinetiq import motion_training
from kinetiq.__main__ import main
from kinetiq.checkpoint import embedded_folder
from kinetiq.clip import Clip
from kinetiq.engine import Engine
from kinetiq.errors import RequestError
from kinetiq.motion_embedding import MotionEmbedding
from kinetiq.motion_file import MotionInfo
from kinetiq.motion_injection import MotionInjection
from kinetiq.motion_lora import MotionLora
from kinetiq.query_injection import QueryInjection
from kinetiq.sprites import training

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a command in an empty folder; a traceback fails the test."""
    monkeypatch.chdir(tmp_path)

    def invoke(*words):
        result = CliRunner().invoke(main, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def generate(run):
    """Generate in one step; words that come again win."""
    return lambda *words: run(
        *("generate", "--prompt", "a red circle", "--out", "out.gif", "--steps", "1", *words)
    )


@pytest.fixture
def unloaded(monkeypatch):
    """Loading a model fails the test."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Engine, "load", load)


def moving(frames: int = 8) -> Clip:
    array = np.zeros((frames, 32, 32, 3), np.uint8)
    for index in range(frames):
        array[index, 8:16, 2 * index : 2 * index + 8] = 255
    return Clip(array, 8)


@pytest.fixture
def references(tmp_path):
    """Clips that can be read and files that cannot, in the folder where commands run."""
    moving().write(tmp_path / "good.gif")
    moving(1).write(tmp_path / "still.png")
    moving().write(tmp_path / "cut.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:-400])
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    Image.new("L", (32, 32), 0).save(tmp_path / "black.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "white.png")


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def motions(tmp_path):
    """Learned motions in the folder where commands run; at a block that no network need have."""
    info = MotionInfo(kind="embedding", family="animatediff", frames=4, height=8, width=8)
    block = "up_blocks.1.motion_modules.0.transformer_blocks.0"
    value = {f"{block}.attn1": torch.ones(4, 4, 4, 32)}
    tensors = {"query_key": {block: torch.ones(4, 32)}, "value": value}
    MotionEmbedding(**tensors, info=info).write(tmp_path / "dance.safetensors")
    brought = MotionEmbedding(**tensors, info=info).resample(frames=6).resize(height=4, width=12)
    brought.write(tmp_path / "long.safetensors")
    lora = {f"{block}.attn1.to_k": torch.ones(2, 2)}
    info = attrs.evolve(info, kind="lora")
    MotionLora(lora, lora, info=info).write(tmp_path / "lora.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "motion_embed.pt")


@pytest.fixture
def refused(tmp_path):
    """Check that a command ended with one line and `status`, and wrote nothing."""
    before = tree(tmp_path)

    def check(result, message, status=2):
        assert (result.exit_code, result.stdout) == (status, "")
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith("kinetiq") and ": error: " in result.stderr
        assert message in result.stderr, result.stderr
        assert tree(tmp_path) == before

    return check


class TestMain:
    def test_nothing_asked_shows_help(self, run):
        result = run()
        assert (result.exit_code, result.stderr) == (0, "")
        listed = [line.split()[0] for line in result.stdout.split("Commands:\n")[1].splitlines()]
        before = [
            "demo",
            "generate",
            "batch",
            "serve",
            "shots",
            "train",
            "motion",
            "analyze",
            "convert",
            "doctor",
        ]
        assert listed == [*before, "export", "bench"]
        assert "..." not in result.stdout.split("Commands:\n")[1]
        assert run("--help").stdout == run("-h").stdout == result.stdout
        assert "  sprites " in run("train").stdout

    def test_version(self, run):
        assert run("--version").stdout == f"kinetiq, version {command_line.kinetiq.__version__}\n"

    def test_doctor(self, run):
        assert "torch" in run("doctor").stdout
        assert json.loads(run("doctor", "--json").stdout)["models"] == ["sprites"]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--nope"], "kinetiq: error: No such option '--nope'. (see kinetiq --help)"),
            (["generat"], "kinetiq: error: No such command 'generat'"),
            (["generate", "--nope"], "kinetiq generate: error: No such option '--nope'"),
            (["generate", "--out", "a.mp4"], "Missing option '--prompt'"),
            (["demo", "--seed", "x"], "'x' is not a valid integer"),
            (["train", "sprites", "--out", "x", "--steps", "0"], "0 is not in the range x>=1"),
            (["bench", "--nope"], "kinetiq bench: error: No such option '--nope'"),
            (["bench", "nope"], "kinetiq bench: error: NAME must be one of sprites, query"),
            (
                ["bench", "query", "--device", "tpu"],
                "kinetiq: error: device: must be 'cpu', 'cuda'",
            ),
        ],
    )
    def test_wrong_usage_is_one_line(self, run, refused, words, message):
        refused(run(*words), message)

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (OSError(28, "No space left on device"), "the operating system refused: [Errno 28] No"),
            (MemoryError("Unable to allocate 4 TiB"), "memory must suffice, and does not: Unable"),
            (
                torch.OutOfMemoryError("CUDA out of memory.\nTried"),
                "and does not: CUDA out of memory.",
            ),
            (
                RuntimeError("[enforce] DefaultCPUAllocator: can't"),
                "and does not: [enforce] Default",
            ),
        ],
    )
    def test_what_the_machine_refuses(self, generate, refused, monkeypatch, error, message):
        def load(*_, **__):
            raise error

        monkeypatch.setattr(Engine, "load", load)
        refused(generate(), message, status=1)

    @pytest.mark.usefixtures("unloaded")
    def test_a_defect_of_ours_keeps_its_traceback(self, generate):
        with pytest.raises(AssertionError, match="a model was loaded"):
            generate()

    def test_a_defect_that_is_no_lack_of_memory(self, generate, monkeypatch):
        def load(*_, **__):
            raise RuntimeError("shapes differ")

        monkeypatch.setattr(Engine, "load", load)
        with pytest.raises(RuntimeError, match="shapes differ"):
            generate()

    def test_interrupt(self, generate, tmp_path, monkeypatch):
        monkeypatch.setattr(Engine, "load", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        # A shell starts what runs in its background with this signal ignored, tests too.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        result = generate()
        signal.signal(signal.SIGINT, before)
        assert (result.exit_code, result.stdout) == (130, "")
        assert result.stderr.strip() == "kinetiq: error: interrupted"
        assert tree(tmp_path) == {}

    def test_a_reader_that_has_gone_is_no_matter(self):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-m", "kinetiq", "--help"],
            check=False,
            cwd="/",
            stdout=write,
            stderr=subprocess.PIPE,
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (1, b"")

    def test_our_folders_answer_for_no_package(self):
        """transformers and diffusers probe for a package `kernels`, which ours must not be."""
        code = (
            "import atexit, importlib.util, runpy, sys; sys.argv = ['kinetiq', '--version']; "
            "atexit.register(lambda: print([importlib.util.find_spec(name) for name in "
            "('kernels', 'bench', 'export', 'engine')])); "
            "runpy.run_module('kinetiq', run_name='__main__')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        version, found = done.stdout.splitlines()
        assert version.startswith("kinetiq, version ")
        assert str(ROOT) not in found


class TestGenerate:
    def test_says_what_was_made(self, generate, tmp_path):
        result = generate("--scale", "2", "--size", "16x24")
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == "out.gif: 8 frames of 32x48 (height x width), 8 a second\n"
        assert Clip.read(tmp_path / "out.gif").frames.shape == (8, 32, 48, 3)
        assert [path.name for path in tmp_path.iterdir()] == ["out.gif"]

    @pytest.mark.usefixtures("references")
    def test_json_is_one_object(self, generate, tmp_path):
        words = ("--reference", "good.gif", "--control", "both", "--size", "16x24", "--frames", "4")
        result = generate("--json", *words, "--fps", "5", "--seed", "9", "--out", "out.webp")
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.count("\n") == 1
        said = json.loads(result.stdout)
        assert said.pop("out") == "out.webp"
        assert said == {"frames": 4, "height": 16, "width": 24, "fps": 5.0, "seed": 9}
        assert Clip.read(tmp_path / "out.webp").frames.shape == (4, 16, 24, 3)

    @pytest.mark.usefixtures("references")
    def test_options_reach_the_request_and_the_control(self, generate, monkeypatch):
        seen = {}

        def fake(self, prompt, control, *, progress, **options):
            seen.update(options, prompt=prompt, control=control)
            return moving()

        monkeypatch.setattr(Engine, "generate", fake)
        result = generate(
            *("--reference", "good.gif", "--control", "both", "--until", "0.25", "--fit", "fit"),
            *("--sites", "down_blocks.1, mid_block", "--reduce-leak", "--parts", "qk"),
            *("--halves", "cond", "--region", "white.png", "--size", "16x24"),
            *("--guidance", "2.5", "--sampler", "euler", "--negative-prompt", "a ring"),
            *("--eta", "0", "--frames", "8", "--fps", "12", "--seed", "4", "--steps", "3"),
        )
        assert result.exit_code == 0, result.stderr
        query, motion = seen.pop("control")
        words = {"prompt": "a red circle", "negative_prompt": "a ring", "sampler": "euler"}
        numbers = {"seed": 4, "steps": 3, "guidance_scale": 2.5, "eta": 0.0, "fps": 12.0}
        assert seen == words | numbers | {"frames": 8, "height": 16, "width": 24}
        assert isinstance(query, QueryInjection) and isinstance(motion, MotionInjection)
        assert query.sites == ("down_blocks.1", "mid_block") and query.reduce_leak
        assert motion.sites == "temporal" and motion.parts == "qk"
        for control in (query, motion):
            assert control.until == 0.25 and control.halves == "cond"
            assert control.reference == moving().resize(16, 24, "fit")
            assert control.region.shape == (32, 32) and (control.region == 1).all()

    @pytest.mark.usefixtures("references")
    @pytest.mark.parametrize(
        ("words", "kinds"),
        [
            ((), []),
            (("--reference", "good.gif"), [MotionInjection]),
            (("--reference", "good.gif", "--control", "query"), [QueryInjection]),
            (("--reference", "good.gif", "--control", "none"), []),
        ],
    )
    def test_which_control(self, generate, monkeypatch, words, kinds):
        seen = []

        def fake(self, prompt, control, **_):
            seen.extend(control)
            return moving()

        monkeypatch.setattr(Engine, "generate", fake)
        assert generate(*words).exit_code == 0
        assert [type(control) for control in seen] == kinds
        assert all(control == type(control)(control.reference) for control in seen)  # its defaults

    @pytest.mark.usefixtures("references", "motions")
    def test_learned_motions_are_added_up_and_take_their_switches(self, generate, monkeypatch):
        seen = []

        def fake(self, prompt, control, **_):
            seen.extend(control)
            return moving()

        monkeypatch.setattr(Engine, "generate", fake)
        result = generate(
            *("--motion", "0.5*dance.safetensors", "--motion", "-2e0 * long.safetensors"),
            *("--motion", "lora.safetensors", "--motion-scale", "-0.5", "--value-scale", "2"),
            *("--debias", "mean", "--noise-prior", "0", "--until", "0.25", "--halves", "cond"),
            *("--highway", "all", "--beta", "1.2", "--reference", "good.gif"),
        )
        assert result.exit_code == 0, result.stderr
        injection, embedding, lora = seen
        shared = {"scale": -0.5, "until": 0.25, "halves": "cond"}
        assert all(getattr(m, n) == v for m in (embedding, lora) for n, v in shared.items())
        assert (embedding.value_scale, embedding.debias) == (2.0, "mean")
        assert (lora.highway, lora.beta) == ("all", 1.2)
        assert embedding.info.shape == (4, 8, 8)  # the first's
        assert all((tensor == 0.5 - 2.0).all() for tensor in embedding.query_key.values())
        assert isinstance(injection, MotionInjection) and injection.until == 0.25

    @pytest.mark.usefixtures("motions")
    def test_a_learned_motion_alone_is_used_by_its_defaults(self, generate, monkeypatch):
        seen = []

        def fake(self, prompt, control, **_):
            seen.extend(control)
            return moving()

        monkeypatch.setattr(Engine, "generate", fake)
        assert generate("--motion", "dance.safetensors").exit_code == 0
        assert seen == [MotionEmbedding.read("dance.safetensors")]

    @pytest.mark.usefixtures("motions")
    def test_of_two_learned_motions_the_first_that_has_noise_brings_it(
        self, generate, monkeypatch, tmp_path
    ):
        resolved = []

        def fake(self, prompt, control, **_):
            resolved.append({type(one): one.noise_share for one in control})
            return moving()

        monkeypatch.setattr(Engine, "generate", fake)
        for kind, name in ((MotionEmbedding, "dance"), (MotionLora, "lora")):
            motion = kind.read(tmp_path / f"{name}.safetensors")
            attrs.evolve(motion, noise=torch.randn(4, *motion.info.shape)).write(
                tmp_path / f"noisy-{name}.safetensors"
            )
        dance, lora = "noisy-dance.safetensors", "noisy-lora.safetensors"
        for words, wanted in (
            ((dance, "--motion", lora), (0.5, 0.0)),
            ((lora, "--motion", dance), (0.0, 0.2)),
            ((lora, "--motion", dance, "--noise-prior", "0.7"), (0.0, 0.7)),
            (("dance.safetensors", "--motion", lora), (0.0, 0.2)),
            ((f"-1*{dance}", "--motion", lora), (0.0, 0.2)),
            ((f"-{dance}", "--motion", lora, "--noise-prior", "0.9"), (0.0, 0.9)),
        ):
            assert generate("--motion", *words).exit_code == 0
            got = resolved.pop()
            assert (got[MotionEmbedding], got[MotionLora]) == wanted

    @pytest.mark.usefixtures("motions")
    def test_what_files_say_of_their_use_holds_until_it_is_said_otherwise(
        self, generate, monkeypatch, tmp_path
    ):
        seen = []

        def fake(self, prompt, control, **_):
            seen.extend(control)
            return moving()

        monkeypatch.setattr(Engine, "generate", fake)
        lora = MotionLora.read(tmp_path / "lora.safetensors")
        trained = attrs.evolve(lora, highway="all", beta=1.3)
        trained.write(tmp_path / "trained.safetensors")
        alone = ("--motion", "trained.safetensors")
        both = (*alone, "--motion", "lora.safetensors")
        for words, wanted in (
            (alone, ("all", 1.3)),
            ((*alone, "--beta", "1"), ("all", 1.0)),
            ((*alone, "--highway", "none"), (None, None)),
            ((*both, "--highway", "released", "--beta", "1.2"), ("released", 1.2)),
            ((*both, "--highway", "none"), (None, None)),
        ):
            result = generate(*words)
            assert result.exit_code == 0, result.stderr
            got = seen.pop()
            assert (got.highway, got.beta) == wanted
        result = generate(*both)
        assert "must have the same highway, got 'all' and None" in result.stderr

    @pytest.mark.usefixtures("motions")
    def test_a_learned_motion_moves_a_clip(self, generate, tiny_folder, tmp_path):
        words = ("--model", str(tiny_folder()), "--frames", "3", "--size", "16x16")
        assert generate(*words, "--out", "plain").exit_code == 0
        result = generate(*words, "--motion", "-1*dance.safetensors", "--out", "moved")
        assert (result.exit_code, result.stderr) == (0, "")
        none = generate(*words, "--motion", "0*dance.safetensors", "--out", "none")
        assert none.exit_code == 0
        plain, moved, none = (Clip.read(tmp_path / name) for name in ("plain", "moved", "none"))
        assert plain == none != moved

    @pytest.mark.usefixtures("references")
    def test_a_moving_region(self, generate, monkeypatch):
        regions = []

        def fake(self, prompt, control, **_):
            regions.append(control[0].region)
            return moving()

        monkeypatch.setattr(Engine, "generate", fake)
        assert generate("--reference", "good.gif", "--region", "good.gif").exit_code == 0
        assert regions[0].shape == (8, 32, 32) and regions[0].max() == 1

    def test_a_prompt_that_is_too_long_is_cut_with_a_word(self, generate, tmp_path):
        result = generate("--prompt", "a red circle on a blue background " * 4, "--frames", "1")
        assert result.exit_code == 0 and (tmp_path / "out.gif").exists()
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("kinetiq: warning: encode_prompts: prompt 'a red circle")
        assert "the end was cut off: 'red circle on a blue background'" in result.stderr
        again = generate("--prompt", "a red circle on a blue background " * 4, "--frames", "1")
        assert again.stderr == result.stderr  # said every time, not once a process


@pytest.mark.usefixtures("motions", "unloaded")
class TestMotion:
    def test_terms_become_a_file(self, run, tmp_path):
        words = ("--motion", "0.5*dance.safetensors", "--motion", "-long.safetensors")
        result = run("motion", *words, "--frames", "6", "--out", "mix.safetensors")
        assert (result.exit_code, result.stdout) == (0, "mix.safetensors\n"), result.stderr
        dance, long, mix = (
            MotionEmbedding.read(tmp_path / f"{name}.safetensors")
            for name in ("dance", "long", "mix")
        )
        brought = long.resample(frames=4).resize(height=8, width=8)
        assert mix == (0.5 * dance + -1.0 * brought).resample(frames=6)
        assert mix.info.frames == 6

    def test_a_lora_is_scaled(self, run, tmp_path):
        result = run(
            "motion", "--motion", "-2*lora.safetensors", "--out", "b.safetensors", "--json"
        )
        said = json.loads(result.stdout)
        assert (said["kind"], said["rank"], said["out"]) == ("lora", 2, "b.safetensors")
        lora, made = (MotionLora.read(tmp_path / f"{n}.safetensors") for n in ("lora", "b"))
        assert made == -2.0 * lora

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "Missing option '--motion'"),
            (["--motion", "dance.safetensors", "--motion", "lora.safetensors"], "be of one kind"),
            (["--motion", "lora.safetensors", "--frames", "6"], "--frames acts on a motion embed"),
            (["--motion", "dance.safetensors", "--frames", "1"], "a motion has at least 2 frames"),
            (["--motion", "absent.safetensors"], "must be a motion's file, and is not there"),
            (["--motion", "dance.safetensors", "--out", "a.pt"], "--out must end in .safetensors"),
        ],
    )
    def test_says_what_is_wrong(self, run, refused, words, message):
        refused(run("motion", "--out", "mix.safetensors", *words), message)


@pytest.mark.usefixtures("references", "unloaded")
class TestBeforeAModelLoads:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("absent.mp4", "Clip.read: absent.mp4 does not exist; check the path"),
            ("empty.mp4", "empty.mp4 must be a video or a picture, got an empty file"),
            ("cut.mp4", "cut.mp4"),
            ("sound.mp4", "must hold a video stream, got audio only"),
            ("still.png", "reference: must have at least 2 frames to hold motion, got 1"),
        ],
    )
    def test_reference(self, generate, refused, name, message):
        refused(generate("--reference", name), message)

    def test_a_reference_that_may_not_be_read(self, generate, refused, monkeypatch):
        def refuse(path, *_):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so act it
        refused(generate("--reference", "good.gif"), "must be readable (Permission denied); check")

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            ("absent/out.mp4", "the folder absent must exist to hold 'out.mp4'; create it"),
            ("out.xyz", "must end in one of .mp4, .webm, .gif, .webp, .png, or in nothing"),
            (".", "must name a file or a folder"),
            ("good.gif/out.mp4", "the folder good.gif must exist"),
        ],
    )
    def test_target(self, generate, refused, out, message):
        refused(generate("--out", out), message)

    def test_a_target_that_may_not_be_written(self, generate, refused, monkeypatch):
        monkeypatch.setattr(files_module.os, "access", lambda *_: False)
        refused(generate(), "out.gif cannot be written (Permission denied); check the permission")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--frames", "0"], "frames: must be a whole number from 1 to 1024, got 0"),
            (["--steps", "0"], "steps: must be a whole number from 1 to 1000, got 0"),
            (["--steps", "1001"], "steps: must be a whole number from 1 to 1000, got 1001"),
            (["--guidance", "0.5"], "guidance_scale: must be a number from 1 to 100, got 0.5"),
            (["--guidance", "nan"], "guidance_scale: must be a number from 1 to 100, got nan"),
            (["--fps", "0"], "fps: must be a number from 0.1 to 240, got 0.0"),
            (["--fps", "240"], "out.gif can show at most 50 frames a second, got 240"),
            (["--seed", "-1"], "seed: must be a whole number from 0 to"),
            (["--seed", str(2**63)], "seed: must be a whole number from 0 to"),
            (["--eta", "2"], "eta: must be a number from 0 to 1, got 2.0"),
            (["--size", "0x32"], "height: must be a whole number from 8 to 4096, got 0"),
            (["--size", "32x5000"], "width: must be a whole number from 8 to 4096, got 5000"),
            (["--size", "32"], "--size must be HEIGHTxWIDTH such as 320x512, got '32'"),
            (["--size", "²x²"], "--size must be HEIGHTxWIDTH"),
            (["--scale", "0"], "0 is not in the range 1<=x<=64"),
            (["--prompt", " "], "prompt: must hold at least one word, got an empty one"),
            (["--control", "query"], "generate: --control query needs --reference, got none"),
            (["--control", "dance"], "'dance' is not one of 'motion', 'query', 'both', 'none'"),
            (["--until", "0.5"], "--until acts with a --reference and --control motion, query"),
            (["--fit", "crop"], "generate: --fit needs --reference, got none"),
        ],
    )
    def test_options(self, generate, refused, words, message):
        refused(generate(*words), message)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--until", "1.5"], "until: must be a number from 0 to 1, got 1.5"),
            (["--until", "-0.1"], "until: must be a number from 0 to 1, got -0.1"),
            (["--until", "nan"], "until: must be a number from 0 to 1, got nan"),
            (["--parts", "qz"], "parts: must be letters among q, k and v, got 'qz'"),
            (["--parts", ""], "parts: must be letters among q, k and v, got ''"),
            (["--halves", "none"], "'none' is not one of 'both', 'cond'"),
            (["--sites", "spatial"], "--sites acts with a --reference and --control query or"),
            (["--reduce-leak"], "--reduce-leak acts with a --reference and --control query or"),
            (["--control", "query", "--parts", "q"], "--parts acts with a --reference and --con"),
            (["--control", "none", "--until", "1"], "or both, got --control none"),
            (["--region", "absent.png"], "absent.png does not exist"),
            (["--region", "empty.mp4"], "got an empty file"),
            (["--region", "black.png"], "must be white where the motion is wanted, and black.png"),
        ],
    )
    def test_controls(self, generate, refused, words, message):
        refused(generate("--reference", "good.gif", *words), message)

    @pytest.mark.usefixtures("motions")
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["absent.safetensors"], "absent.safetensors must be a motion's file, and is not ther"),
            (["other.safetensors"], "must be a motion that kinetiq wrote"),
            (["good.gif"], "good.gif must be a whole safetensors file"),
            (["2*motion_embed.pt"], "kinetiq convert motion_embed.pt --out motion_embed.safetenso"),
            (["1e999*dance.safetensors"], "a factor must be finite, got inf"),
            (["x*dance.safetensors"], "x*dance.safetensors must be a motion's file"),
            (["dance.safetensors", "--debias", "most"], "'most' is not one of 'difference'"),
            (["dance.safetensors", "--until", "2"], "until: must be a number from 0 to 1, got 2.0"),
            (
                ["dance.safetensors", "--noise-prior", "2"],
                "noise_prior: must be a number from 0 to",
            ),
            (
                ["dance.safetensors", "--motion-scale", "nan"],
                "scale: must be a finite number, got ",
            ),
            (["dance.safetensors", "--highway", "all"], "is of kind lora, got embedding"),
            (["lora.safetensors", "--beta", "1.2"], "beta: acts with a highway, got 1.2 without"),
            (["dance.safetensors", "--noise-prior", "0.9"], "a motion has no noise of its refer"),
            (
                ["dance.safetensors", "--debias", "drop", "--value-scale", "3"],
                "value_scale: must be 1 or left out where debias is 'drop', got 3.0",
            ),
            (["-absent.safetensors"], "absent.safetensors must be a motion's file, and is not"),
            (["lora.safetensors", "--debias", "none"], "is of kind embedding, got lora"),
            (["dance.safetensors", "--parts", "q"], "--parts acts with a --reference and --contro"),
        ],
    )
    def test_learned_motions(self, generate, refused, words, message):
        refused(generate("--motion", *words), message)

    def test_a_switch_of_a_learned_motion_needs_one(self, generate, refused):
        message = "--noise-prior acts with a --motion that is of kind embedding or lora, got no --m"
        refused(generate("--noise-prior", "0.5"), message)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--out", "good.gif"], "good.gif must be a folder that can be written, and is none"),
            (["--steps", "x"], "'x' is not a valid integer"),
            (["--steps", "0"], "steps: must be a whole number from 1 to 1000, got 0"),
            (["--until", "2"], "until: must be a number from 0 to 1, got 2.0"),
            (["--size", "32x48"], "demo: --size must be a square such as 48x48, got '32x48'"),
            (["--size", "48"], "demo: --size must be HEIGHTxWIDTH such as 320x512, got '48'"),
            (["--size", "128x128"], "demo: size must be 32 to 64 pixels, at which clips can be"),
            (["--frames", "33"], "demo: frames must be 2 to 32, whose motion can be read back"),
            (["--frames", "1"], "demo: frames must be 2 to 32"),
            (["--fps", "60"], "side-by-side.gif can show at most 50 frames a second, got 60"),
        ],
    )
    def test_demo(self, run, refused, words, message):
        refused(run("demo", *words), message)


@pytest.mark.usefixtures("references")
class TestWithAModel:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--size", "33x32"], "height: must be a multiple of 2 for sprites, got 33"),
            (["--frames", "33"], "frames: must be at most 32, the positions that sprites knows"),
            (["--sampler", "nope"], "sampler: must be one of ddim, ddpm, euler, dpm++2m, lcm"),
            (["--out", "out.png"], "out.png can hold one frame, got 8"),
            (["--reference", "good.gif", "--frames", "1"], "frames: must be at least 2 where a"),
            (
                ["--reference", "good.gif", "--control", "query", "--sites", "nowhere"],
                "or names of sites, got 'nowhere'; this network has ",
            ),
            (
                ["--reference", "good.gif", "--frames", "4", "--region", "good.gif"],
                "region: must be [height, width] or [frames = 4, height, width], got [8, 32, 32]",
            ),
            (["--model", "nope"], "load: model must be 'sprites', a folder that exists or a hub"),
            (["--motion-adapter", "nope"], "motion_adapter must be left out for sprites"),
            (
                ["--device", "tpu"],
                "device: must be 'cpu', 'cuda' or 'cuda:<index>', got 'tpu'",
            ),
            (["--dtype", "int8"], "load: dtype must be one of float64, float32"),
            (["--backend", "nope"], "load: backend must be one of eager"),
            (["--network", "net.onnx"], "load: network needs a backend that runs an exported"),
            (["--trust", "0" * 64], "load: trust needs a backend that runs an exported network"),
        ],
    )
    def test_options(self, generate, refused, words, message):
        refused(generate(*words), message)

    @NO_GPU
    def test_no_gpu(self, generate, refused):
        refused(generate("--device", "cuda"), "device: 'cuda' needs an NVIDIA GPU", status=1)

    @NO_GPU
    def test_a_back_end_of_gpus_asks_for_one_by_itself(self, generate, refused):
        refused(generate("--backend", "tensorrt"), "an NVIDIA GPU that PyTorch", status=1)

    @pytest.mark.parametrize("command", ["generate", "demo"])
    def test_what_the_back_end_runs(self, run, monkeypatch, command):
        loads = []

        def load(*_, **options):
            loads.append(options)
            raise RequestError("loaded")

        monkeypatch.setattr(Engine, "load", load)
        words = ("--prompt", "a ring", "--out", "out.gif") if command == "generate" else ()
        given = ("--network", "net.engine", "--trust", "ab", "--trust", "cd")
        assert "loaded" in run(command, *words, "--backend", "tensorrt", *given).stderr
        assert loads[0]["network"] == Path("net.engine")
        assert (loads[0]["trust"], loads[0]["device"]) == (("ab", "cd"), None)

    def test_demo(self, run, refused):
        result = run("demo", "--size", "33x33", "--out", "new")
        refused(result, "height: must be a multiple of 2 for sprites, got 33")

    def test_a_reference_larger_than_memory(self, generate, monkeypatch):
        """Its frames are brought to the size of the clip one by one."""
        moving().resize(320, 320).write("large.mp4")
        monkeypatch.setattr(clip_module, "MAX_BYTES", 4 * 320 * 320 * 3)
        result = generate("--reference", "large.mp4")
        assert (result.exit_code, result.stderr) == (0, "")


@pytest.fixture
def model(tiny_folder, tmp_path_factory):
    """A folder of a whole model that the test may damage."""
    path = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(tiny_folder(), path)
    return path


class TestBrokenModels:
    def test_a_whole_one_generates(self, generate, model):
        result = generate("--model", str(model), "--frames", "2", "--size", "16x16")
        assert result.exit_code == 0, result.stderr

    @pytest.mark.parametrize(
        ("gone", "message"),
        [
            ("vae", "load: vae must be a folder at"),
            ("tokenizer", "tokenizer"),
            ("model_index.json", "model_index.json"),
            ("scheduler/scheduler_config.json", "scheduler"),
            ("unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
        ],
    )
    def test_a_component_is_missing(self, generate, refused, model, gone, message):
        if (model / gone).is_dir():
            shutil.rmtree(model / gone)
        else:
            (model / gone).unlink()
        refused(generate("--model", str(model)), message)

    def test_pickled_weights(self, generate, refused, model):
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
        refused(generate("--model", str(model)), "any code; convert it with")

    def test_weights_that_are_no_numbers(self, generate, refused, model):
        weights = model / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        next(iter(tensors.values())).view(-1)[0] = torch.nan
        save_file(tensors, weights)
        refused(generate("--model", str(model)), "must have finite weights, got NaN or infinity")

    def test_an_image_model(self, generate, refused, tmp_path_factory):
        import tiny

        base, _ = tiny.write_tiny_base_and_adapter(tmp_path_factory.mktemp("image"))
        refused(generate("--model", str(base)), "adapter")


class TestConvert:
    @pytest.fixture
    def pickled(self, tmp_path):
        (tmp_path / "model").mkdir()
        torch.save({"w": torch.ones(2)}, tmp_path / "model" / "diffusion_pytorch_model.bin")
        return tmp_path / "model"

    def test_beside_the_source_where_nothing_is_said(self, run, pickled, tmp_path, monkeypatch):
        assert run("convert", "model/").stdout == "model-safetensors\n"
        shutil.rmtree(tmp_path / "model-safetensors")
        monkeypatch.chdir(pickled)
        made = tmp_path / "model-safetensors"
        result = run("convert", ".")
        assert (result.exit_code, result.stdout) == (0, f"{made}\n")
        assert result.stderr == "converting diffusion_pytorch_model.bin\n"
        assert [path.name for path in made.iterdir()] == ["diffusion_pytorch_model.safetensors"]

    def test_what_cannot_be_converted(self, run, refused):
        refused(run("convert", "/"), "convert: --out must be given for /, which has no name")
        refused(run("convert", "absent"), "absent must be a folder of a model, and is not there")


class TestTrain:
    @pytest.fixture
    def trained(self, monkeypatch):
        """What `training.train` was asked, instead of training."""
        asked = {}

        def train(out, options, *, start_from, report, progress):
            asked.update(out=out, options=options, start_from=start_from)
            asked["threads"] = torch.get_num_threads()
            report(training.TrainingStep("denoiser", 7, 0.5, 3.2))
            report(training.TrainingStep("denoiser", 9, None, 4.1, frame_loss=0.25))
            progress("denoiser", 9, 30)  # not drawn: there is no terminal
            return out / "checkpoint"

        monkeypatch.setattr(training, "train", train)
        return asked

    def test_options_reach_the_training(self, run, trained):
        threads = torch.get_num_threads()
        result = run(
            *("train", "sprites", "--out", "run", "--steps", "30", "--decay-steps", "5"),
            *("--vae-steps", "6", "--batch", "2", "--learning-rate", "0.001", "--seed", "4"),
            *("--save-every", "9", "--threads", str(threads + 1), "--start-from", "sprites"),
            *("--frame-share", "0.25", "--shards", "2", "--noise-shift", "2"),
        )
        assert (result.exit_code, result.stdout) == (0, "run/checkpoint\n")
        assert result.stderr == (
            "denoiser 7: loss 0.5000, 3 s\ndenoiser 9: loss of single frames 0.2500, 4 s\n"
        )
        assert trained.pop("options") == training.TrainingOptions(
            steps=30,
            decay_steps=5,
            vae_steps=6,
            batch=2,
            frame_share=0.25,
            noise_shift=2.0,
            learning_rate=0.001,
            seed=4,
            save_every=9,
            shards=2,
            device="cpu",
        )
        assert trained == {
            "out": Path("run"),
            "start_from": embedded_folder(),
            "threads": threads + 1,
        }
        assert torch.get_num_threads() == threads

    def test_left_out_is_the_default(self, run, trained):
        assert run("train", "sprites", "--out", "run").exit_code == 0
        assert trained["options"] == training.TrainingOptions()
        assert trained["start_from"] is None

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--learning-rate", "nan"], "--learning-rate must be above 0 and at most 1, got nan"),
            (["--learning-rate", "0"], "--learning-rate must be above 0 and at most 1, got 0"),
            (["--start-from", "absent"], "--start-from must be 'sprites' or the folder of a"),
            (["--device", "tpu"], "device: must be 'cpu', 'cuda' or 'cuda:<index>', got 'tpu'"),
        ],
    )
    def test_says_what_is_wrong(self, run, refused, trained, words, message):
        refused(run("train", "sprites", "--out", "run", *words), message)
        assert trained == {}


@pytest.mark.usefixtures("references")
class TestTrainMotion:
    WORDS = (
        *("--reference", "good.gif", "--prompt", "a square moving right"),
        *("--out", "a.safetensors"),
    )

    @pytest.fixture
    def learned(self, monkeypatch):
        """What the training of a motion was asked, instead of training."""
        asked = {}

        class Made:
            info = MotionInfo(kind="embedding", family="animatediff", frames=8, height=16, width=16)

        def learn(engine, clips, prompts, out, options, *, folder, report, progress):
            asked.update(clips=clips, prompts=prompts, out=out, options=options, folder=folder)
            asked["weights"] = engine.checkpoint.dtype
            report(motion_training.MotionTrainingStep(7, 0.5, None, 3.2, 1.0))
            report(motion_training.MotionTrainingStep(9, 0.25, 0.125, 4.1, 1.0))
            progress("training", 9, 30)  # not drawn: there is no terminal
            return Made

        monkeypatch.setattr(motion_training, "train_embedding", learn)
        monkeypatch.setattr(motion_training, "train_lora", learn)
        return asked

    def test_options_reach_the_training_of_an_embedding(self, run, learned):
        result = run(
            *("train", "embedding", *self.WORDS, "--steps", "30", "--learning-rate", "0.01"),
            *("--sites", "up:128, down_blocks.1", "--frames", "6", "--spatial-skip", "0.3"),
            *("--spatial-rank", "5", "--spatial-learning-rate", "0.001", "--clip-norm", "2"),
            *("--weight-decay", "0.02"),
            *("--height", "16", "--width", "24", "--dtype", "bfloat16", "--seed", "4"),
            *("--save-every", "9", "--previews", "3", "--preview-prompt", "a circle"),
            *("--recompute", "--dropout", "0.1", "--inversion-steps", "7", "--folder", "here"),
            *("--weights", "bfloat16"),
        )
        assert (result.exit_code, result.stdout) == (0, "a.safetensors\n")
        assert result.stderr == (
            "step 7: loss 0.5000, 3 s\nstep 9: loss 0.2500, loss of single frames 0.1250, 4 s\n"
        )
        assert learned["options"] == motion_training.EmbeddingOptions(
            steps=30,
            learning_rate=0.01,
            spatial_rank=5,
            spatial_learning_rate=0.001,
            spatial_skip=0.3,
            weight_decay=0.02,
            clip_norm=2.0,
            sites=(("up", 128), "down_blocks.1"),
            frames=6,
            height=16,
            width=24,
            dtype="bfloat16",
            seed=4,
            save_every=9,
            previews=3,
            preview_prompt="a circle",
            recompute=True,
            dropout=0.1,
            inversion_steps=7,
        )
        clip = learned["clips"]
        assert (clip.num_frames, clip.height, clip.width) == (8, 16, 24)
        assert learned["prompts"] == "a square moving right"
        assert (learned["out"], learned["folder"]) == (Path("a.safetensors"), Path("here"))
        assert learned["weights"] == torch.bfloat16

    def test_left_out_is_the_default(self, run, learned):
        assert run("train", "embedding", *self.WORDS).exit_code == 0
        assert learned["options"] == motion_training.EmbeddingOptions()
        assert learned["folder"] is None and learned["weights"] == torch.float32
        assert (learned["clips"].height, learned["clips"].width) == (32, 32)
        assert run("train", "lora", *self.WORDS).exit_code == 0
        assert learned["options"] == motion_training.LoraOptions()

    def test_several_references_of_one_lora(self, run, learned):
        result = run(
            *("train", "lora", *self.WORDS, "--reference", "good.gif"),
            *("--target", "k_out", "--rank", "8", "--json"),
            *("--highway", "released", "--beta", "1.2"),
        )
        made = json.loads(result.stdout)
        assert (made["out"], made["frames"], made["kind"]) == ("a.safetensors", 8, "embedding")
        assert learned["options"] == motion_training.LoraOptions(
            target="k_out", rank=8, highway="released", beta=1.2
        )
        assert len(learned["clips"]) == 2
        assert "2 references: no noise is kept" in result.stderr
        assert list(learned["prompts"]) == ["a square moving right"] * 2

    @pytest.mark.usefixtures("unloaded")
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--reference", "still.png"], "must have at least 2 frames, the motion's, got 1"),
            (["--frames", "9"], "must have at least 9 frames, the motion's, got 8; give a longer"),
            (["--loss", "l1"], "loss must be one of hybrid, debiased, mse, vmc, got 'l1'"),
            (["--learning-rate", "nan"], "learning_rate must be a number above 0 to 10, got nan"),
            (["--steps", "0"], "steps must be a whole number from 1 to 1000000, got 0"),
            (["--sites", "up:wide"], "--sites must be PLACE:WIDTH such as up:1280, or names"),
            (["--out", "a.pt"], "--out must end in .safetensors, got 'a.pt'"),
            (["--out", "no/a.safetensors"], "the folder no must exist"),
            (["--reference", "absent.mp4"], "absent.mp4"),
            (["--prompt", " "], "prompt: must hold at least one word"),
            (["--dtype", "int8"], "dtype must be one of"),
            (["--loss", "mse", "--dropout", "0.5"], "dropout 0.5 acts with the loss 'hybrid'"),
            (
                ["--previews", "0", "--preview-prompt", "a"],
                "'a' acts with previews, and they are 0",
            ),
        ],
    )
    def test_bad_options_are_said_before_a_model_loads(self, run, refused, words, message):
        refused(run("train", "embedding", *self.WORDS, *words), message)

    @pytest.mark.usefixtures("unloaded")
    def test_each_reference_has_a_prompt(self, run, refused):
        result = run("train", "lora", *self.WORDS, "--prompt", "b", "--prompt", "c")
        refused(result, "--prompt must come once, or once for each of 1 --reference, got 3")

    def test_a_motion_is_learned_and_used(self, run):
        result = run(
            *("train", "embedding", *self.WORDS, "--steps", "2", "--previews", "0"),
            *("--inversion-steps", "2"),
        )
        assert (result.exit_code, result.stdout) == (0, "a.safetensors\n")
        result = run(
            *("generate", "--prompt", "a red circle", "--motion", "a.safetensors"),
            *("--steps", "1", "--out", "out.gif"),
        )
        assert result.exit_code == 0, result.stderr
        assert Path("out.gif").exists()
