"""Videos are made here with PyAV and Pillow, read back, and compared with what was drawn."""

import copy
import pickle
import stat
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kinetiq import clip as clip_module
from kinetiq import files as files_module
from kinetiq.clip import Clip, check_write, peek, spread
from kinetiq.errors import ClipError, InputError, OutputError, RequestError


def counting(frames: int = 8, height: int = 24, width: int = 32) -> np.ndarray:
    """Frame k is grey of level 16 + 24 k; a red block marks the top left, a green one the top right."""
    array = np.zeros((frames, height, width, 3), np.uint8)
    array += (16 + 24 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    array[:, :8, :8] = (230, 20, 20)
    array[:, :8, -8:] = (20, 200, 20)
    return array


def levels(clip: Clip) -> list[int]:
    """Which frame of `counting` each frame shows."""
    middle = clip.frames[:, clip.height - 6 : clip.height - 2, clip.width // 2].mean(axis=(1, 2))
    return [round((value - 16) / 24) for value in middle.tolist()]


def encode(
    path: Path,
    frames: np.ndarray,
    *,
    codec="libx264",
    times=None,
    pixel_aspect=None,
    layout=None,
    **options,
) -> Path:
    """Write a video; `times` are milliseconds."""
    with av.open(str(path), "w", options=layout or {}) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = options.pop("pix_fmt", "yuv420p")
        stream.options = {"crf": "8", **options}
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(
                frame, format="rgba" if frame.shape[-1] == 4 else "rgb24"
            )
            image.time_base = Fraction(1, 1000)
            image.pts = index * 125 if times is None else times[index]
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    return path


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def set_display_matrix(
    path: Path, across: int, across_down: int, down_across: int, down: int
) -> None:
    """Rewrite the matrix of the track header (ISO/IEC 14496-12, section 8.3.2)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    values = (across << 16, across_down << 16, 0, down_across << 16, down << 16, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", *values)
    path.write_bytes(data)


def tone(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for index in range(4):
            sound = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            sound.sample_rate, sound.pts = 16000, index * 1024
            container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return path


class TestMaking:
    def test_holds_read_only_frames_that_its_maker_cannot_change(self):
        array = counting()
        clip = Clip(array, 8)
        array[:] = 0
        assert levels(clip) == list(range(8))
        with pytest.raises(ValueError, match="read-only"):
            clip.frames[0] = 0
        for twin in (pickle.loads(pickle.dumps(clip)), copy.deepcopy(clip)):  # noqa: S301 - our own
            assert twin == clip and hash(twin) == hash(clip) and not twin.frames.flags.writeable

    def test_knows_its_size(self):
        clip = Clip(counting(6, 24, 32), 4)
        assert (clip.num_frames, clip.height, clip.width, clip.seconds) == (6, 24, 32, 1.5)
        assert repr(clip) == "Clip(6 frames, 24x32, 4 fps)"
        assert not clip.is_still_image and Clip(counting(1), 8).is_still_image

    def test_equal_by_content_and_rate(self):
        clip = Clip(counting(), 8)
        assert clip == Clip(counting(), 8) and clip != Clip(counting(), 9) and clip != 3
        assert clip != clip.reverse()

    def test_fingerprint_sees_shape_and_content_and_not_the_rate(self):
        frames = counting(2)
        prints = {Clip(frames, fps).fingerprint for fps in (1, 8)}
        assert len(prints) == 1 and len(prints.pop()) == 64
        others = [frames, frames.reshape(2, 32, 24, 3), frames[::-1], frames ^ 1]
        assert len({Clip(np.ascontiguousarray(other), 8).fingerprint for other in others}) == 4

    @pytest.mark.parametrize(
        "kind", [np.float16, np.float32, np.float64, torch.float16, torch.bfloat16, torch.float32]
    )
    def test_floats_keep_every_level_that_the_type_can_tell(self, kind):
        exact = np.arange(256, dtype=np.uint8)[:, None, None, None].repeat(3, axis=-1)
        scaled = exact.astype(np.float64) / 255
        array = (
            torch.tensor(scaled, dtype=kind)
            if isinstance(kind, torch.dtype)
            else scaled.astype(kind)
        )
        step = 1 if kind == torch.bfloat16 else 0  # 8 bits of mantissa do not hold 8 bits of level
        assert np.abs(Clip.from_array(array).frames.astype(int) - exact).max() <= step

    def test_tensors_become_clips_and_back(self):
        clip = Clip.from_array(torch.from_numpy(counting()), fps=12)
        tensor = clip.to_tensor()
        assert tensor.shape == (8, 3, 24, 32) and tensor.dtype == torch.float32
        assert tensor.min() >= 0 and tensor[0, 0, 0, 0] == pytest.approx(230 / 255)
        assert Clip.from_array(tensor.permute(0, 2, 3, 1), fps=12) == clip

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (
                np.zeros((2, 4, 4), np.uint8),
                r"array must be \[frames, height, width, 3\].*got \[2, 4, 4\]",
            ),
            (np.zeros((2, 4, 4, 4), np.uint8), r"got \[2, 4, 4, 4\]"),
            (np.zeros((0, 4, 4, 3), np.uint8), r"at least one of each, got \[0, 4, 4, 3\]"),
            (np.zeros((2, 4, 4, 3), np.int64), "must be uint8, or floating point.*got int64"),
            (np.zeros((2, 4, 4, 3), bool), "got bool"),
            (np.full((2, 4, 4, 3), 255.0), r"in \[0, 1\], got 255 to 255; clamp or rescale"),
            (np.full((2, 4, 4, 3), -0.1), "got -0.1 to -0.1"),
            (torch.full((2, 4, 4, 3), float("nan")), "must be finite.*got nan"),
            (np.full((2, 4, 4, 3), np.inf), "must be finite.*inf"),
            ([[1]], "NumPy array or a torch tensor, got list"),
        ],
    )
    def test_says_what_is_wrong_with_an_array(self, array, words):
        with pytest.raises(ClipError, match=words):
            Clip.from_array(array)

    @pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e4, "8", None, True])
    def test_says_what_is_wrong_with_a_rate(self, fps):
        with pytest.raises(ClipError, match=r"fps must be a number from 0\.01 to 1000"):
            Clip(counting(), fps)

    def test_the_constructor_takes_uint8_only(self):
        with pytest.raises(ClipError, match=r"uint8 array, got float64; Clip\.from_array"):
            Clip(np.zeros((1, 4, 4, 3)), 8)
        with pytest.raises(ClipError, match="got list"):
            Clip([1], 8)


class TestChanging:
    @given(available=st.integers(2, 300), wanted=st.integers(2, 300))
    @settings(max_examples=100, deadline=None)
    def test_spread_is_even_and_keeps_both_ends(self, available, wanted):
        chosen = spread(available, wanted)
        assert chosen[0] == 0 and chosen[-1] == available - 1 and len(chosen) == wanted
        ideal = np.linspace(0, available - 1, wanted)
        assert np.abs(chosen - ideal).max() <= 0.5 + 1e-9

    def test_resample_keeps_the_duration_and_blends_nothing(self):
        clip = Clip(counting(9), 9)
        short = clip.resample(5)
        assert levels(short) == [0, 2, 4, 6, 8] and short.seconds == clip.seconds
        assert levels(clip.resample(17)) == [0, *(i for i in range(1, 9) for _ in "ab")]
        assert levels(clip.resample(1)) == [0] and clip.resample(9) == clip

    def test_a_still_has_no_motion(self):
        still = Clip(counting(1), 8)
        assert still.resample(1) == still
        with pytest.raises(ClipError, match=r"needs motion, and a still image .* has none"):
            still.resample(16)

    @pytest.mark.parametrize("frames", [0, -3, 2.5, "4", True])
    def test_resample_wants_a_count(self, frames):
        with pytest.raises(RequestError, match="whole number of at least 1"):
            Clip(counting(), 8).resample(frames)

    def test_mirror_and_reverse_undo_themselves(self):
        clip = Clip(counting(), 8)
        assert levels(clip.reverse()) == list(range(7, -1, -1)) and clip.reverse().reverse() == clip
        assert (clip.mirror().frames[:, :8, -8:] == (230, 20, 20)).all()
        assert clip.mirror().mirror() == clip

    def test_crop_fills_and_cuts_both_ends_equally(self):
        array = np.zeros((1, 20, 60, 3), np.uint8)
        array[:, :, 20:40] = 200  # the middle third
        assert (Clip(array, 8).resize(20, 20, "crop").frames == 200).all()
        tall = Clip(array.transpose(0, 2, 1, 3).copy(), 8)
        assert (tall.resize(20, 20, "crop").frames == 200).all()

    def test_crop_bears_sizes_whose_quotient_is_not_exact(self):
        clip = Clip(np.full((1, 13, 13, 3), 200, np.uint8), 8)  # 13 - 15 / (15 / 13) is below zero
        assert (clip.resize(15, 15, "crop").frames == 200).all()

    def test_fit_shows_everything_on_black(self):
        clip = Clip(np.full((2, 20, 40, 3), 200, np.uint8), 8).resize(40, 40, "fit")
        assert (clip.frames[:, 10:30] == 200).all()
        assert not clip.frames[:, :10].any() and not clip.frames[:, 30:].any()

    def test_stretch_uses_the_whole_of_both_frames(self):
        clip = Clip(counting(2, 24, 32), 8).resize(48, 16, "stretch")
        assert clip.frames.shape == (2, 48, 16, 3)
        assert np.abs(clip.frames[:, :8, :2].astype(int) - (230, 20, 20)).max() < 12

    @pytest.mark.parametrize("fit", ["crop", "fit", "stretch"])
    def test_making_smaller_does_not_alias(self, fit):
        lines = np.zeros((1, 64, 64, 3), np.uint8)
        lines[:, :, ::2] = 255
        small = Clip(lines, 8).resize(8, 8, fit).frames
        assert np.abs(small.astype(int) - 127).max() <= 8

    @pytest.mark.parametrize("fit", ["crop", "fit", "stretch"])
    @pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (24, 32), (37, 11)])
    def test_any_size(self, fit, size):
        clip = Clip(counting(1), 8).resize(*size, fit)
        assert clip.frames.shape == (1, *size, 3)
        assert size != (24, 32) or clip == Clip(counting(1), 8)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((0, 4), "height must be a whole number of at least 1, got 0"),
            ((4, 2.0), "width must be"),
            ((4, 4, "cover"), "fit must be one of crop, fit, stretch, got 'cover'"),
        ],
    )
    def test_says_what_is_wrong_with_a_size(self, arguments, words):
        with pytest.raises(RequestError, match=words):
            Clip(counting(), 8).resize(*arguments)


class TestReading:
    @pytest.mark.parametrize(
        ("name", "codec"),
        [
            ("a.mp4", "libx264"),
            ("a.mov", "libx264"),
            ("a.webm", "libvpx-vp9"),
            ("a.mkv", "libvpx"),
            ("a.avi", "mpeg4"),
            ("ä b%02d:c.mp4", "libx264"),
        ],
    )
    def test_videos(self, tmp_path, name, codec):
        clip = Clip.read(encode(tmp_path / name, counting(), codec=codec, b="2000000"))
        assert levels(clip) == list(range(8)) and clip.fps == pytest.approx(8, rel=0.01)
        assert np.abs(clip.frames[:, 2:6, 2:6].astype(int) - (230, 20, 20)).max() < 12

    def test_one_frame(self, tmp_path):
        for name, codec in (("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")):
            clip = Clip.read(encode(tmp_path / name, counting(1), codec=codec))
            assert clip.is_still_image and levels(clip) == [0]

    @pytest.mark.parametrize(
        ("matrix", "undo"),
        [
            ((1, 0, 0, 1), lambda f: f),
            (
                (0, 1, -1, 0),
                lambda f: np.rot90(f, -1, axes=(1, 2)),
            ),  # clockwise, as phones write it
            ((-1, 0, 0, -1), lambda f: f[:, ::-1, ::-1]),
            ((0, -1, 1, 0), lambda f: np.rot90(f, 1, axes=(1, 2))),
            ((-1, 0, 0, 1), lambda f: f[:, :, ::-1]),  # a mirrored front camera
        ],
    )
    def test_turned_videos_come_out_upright(self, tmp_path, matrix, undo):
        path = encode(tmp_path / "a.mp4", counting(3))
        stored = Clip.read(path).frames
        set_display_matrix(path, *matrix)
        np.testing.assert_array_equal(Clip.read(path).frames, undo(stored))

    def test_agrees_with_ffmpeg_on_the_sense_of_rotation(self, tmp_path):
        path = encode(tmp_path / "a.mp4", counting(3))
        set_display_matrix(path, 0, 1, -1, 0)
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
        turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        np.testing.assert_array_equal(Clip.read(path).frames[0], turned)

    def test_a_slanted_matrix_is_refused(self, tmp_path):
        path = encode(tmp_path / "a.mp4", counting(3))
        set_display_matrix(path, 1, 1, -1, 1)
        with pytest.raises(ClipError, match=r"turned by quarter turns, .* 45\.0 degrees"):
            Clip.read(path)

    def test_wide_pixels_become_square(self, tmp_path):
        clip = Clip.read(encode(tmp_path / "a.mp4", counting(2), pixel_aspect=Fraction(2, 1)))
        assert (clip.height, clip.width) == (24, 64)
        clip = Clip.read(encode(tmp_path / "b.mp4", counting(2), pixel_aspect=Fraction(1, 2)))
        assert (clip.height, clip.width) == (48, 32)

    def test_variable_rate_is_sampled_by_time(self, tmp_path):
        times = [0, 100, 200, 300, 800, 900]
        clip = Clip.read(encode(tmp_path / "a.webm", counting(6), codec="libvpx-vp9", times=times))
        assert clip.num_frames == 6 and clip.fps == pytest.approx(5 / 0.9, rel=0.01)
        assert levels(clip) == [0, 2, 3, 3, 4, 5]  # shown at 90, 270, 450, 630, 810, 990 ms

    def test_roughly_rounded_times_lose_no_frame(self, tmp_path):
        times = [round(k * 1001 / 30) + (-1) ** k * 5 for k in range(9)]
        times[0] = 0
        clip = Clip.read(encode(tmp_path / "a.webm", counting(9), codec="libvpx-vp9", times=times))
        assert levels(clip) == list(range(9))

    def test_transparency_is_composed_on_black(self, tmp_path):
        array = np.dstack([np.full((24, 32, 3), 200, np.uint8), np.full((24, 32), 255, np.uint8)])
        array[:, :16, 3] = 0
        array[:12, :16, 3] = 128
        expected = np.zeros((24, 32))
        expected[:, 16:], expected[:12, :16] = 200, 100
        video = encode(
            tmp_path / "a.webm", np.stack([array] * 2), codec="libvpx-vp9", pix_fmt="yuva420p"
        )
        frames = Clip.read(video).frames[0, ..., 0].astype(int)
        for rows, columns in (((2, 10), (2, 14)), ((14, 22), (2, 14)), ((2, 22), (18, 30))):
            part = np.s_[slice(*rows), slice(*columns)]
            assert np.abs(frames[part] - expected[part]).max() <= 4
        Image.fromarray(array).save(tmp_path / "a.png")
        np.testing.assert_array_equal(Clip.read(tmp_path / "a.png").frames[0, ..., 1], expected)

    @pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
    def test_animated_pictures(self, tmp_path, suffix):
        first, *rest = [Image.fromarray(frame) for frame in counting()]
        path = tmp_path / f"a{suffix}"
        exact = {"lossless": True} if suffix == ".webp" else {}
        first.save(path, save_all=True, append_images=rest, duration=125, loop=0, **exact)
        clip = Clip.read(path)
        assert levels(clip) == list(range(8)) and clip.fps == pytest.approx(8, rel=0.05)

    def test_a_pause_at_the_end_of_a_gif_costs_no_frame(self, tmp_path):
        first, *rest = [Image.fromarray(frame) for frame in counting(4)]
        first.save(
            tmp_path / "a.gif", save_all=True, append_images=rest, duration=[100, 100, 100, 300]
        )
        clip = Clip.read(tmp_path / "a.gif")
        assert levels(clip) == [0, 1, 2, 3, 3, 3] and clip.fps == pytest.approx(10)

    def test_hasty_gifs_play_as_in_a_browser(self, tmp_path):
        first, *rest = [Image.fromarray(frame) for frame in counting(4)]
        first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=10)
        assert Clip.read(tmp_path / "a.gif").fps == pytest.approx(10)

    def test_folders_in_natural_order(self, tmp_path):
        for index, frame in enumerate(counting(10)):
            Image.fromarray(frame).save(tmp_path / f"Shot{index + 1}.PNG")
        (tmp_path / "notes.txt").write_text("not a frame")
        (tmp_path / ".hidden.png").write_text("nor this")
        (tmp_path / "more.png").mkdir()
        clip = Clip.read(tmp_path)
        assert levels(clip) == list(range(10)) and clip.fps == 8.0
        assert Clip.read(tmp_path, fps=24).fps == 24.0

    def test_the_camera_orientation_of_a_photo(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        Image.fromarray(counting(1)[0]).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(
            Clip.read(tmp_path / "a.png").frames[0], np.rot90(counting(1)[0], -1)
        )

    def test_sixteen_bit_grey(self, tmp_path):
        Image.fromarray(np.full((4, 4), 200 * 256, np.uint16)).save(tmp_path / "a.png")
        assert (Clip.read(tmp_path / "a.png").frames == 200).all()


@pytest.mark.parametrize("fit", ["crop", "fit", "stretch"])
@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "folder"])
def test_read_at_a_size_is_read_and_resized(tmp_path, name, fit):
    Clip(counting(1 if name == "a.png" else 4), 8).write(tmp_path / name)
    read = Clip.read(tmp_path / name, height=10, width=30, fit=fit)
    assert read == Clip.read(tmp_path / name).resize(10, 30, fit)
    assert (read.height, read.width) == (10, 30)


def test_a_turned_video_is_turned_before_it_is_resized(tmp_path):
    path = encode(tmp_path / "a.mp4", counting(3), pixel_aspect=Fraction(2, 1))
    set_display_matrix(path, 0, 1, -1, 0)
    assert Clip.read(path, height=20, width=12) == Clip.read(path).resize(20, 12)


class TestPeeking:
    @pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "folder"])
    def test_the_first_frames_and_no_more(self, tmp_path, name, monkeypatch):
        Clip(counting(), 8).write(tmp_path / name)
        monkeypatch.setattr(clip_module, "MAX_BYTES", 3 * 24 * 32 * 3)  # a whole one does not fit
        assert levels(peek(tmp_path / name)) == [0, 1]
        assert levels(peek(tmp_path / name, 3)) == [0, 1, 2]
        with pytest.raises(ClipError, match="exceed them"):
            Clip.read(tmp_path / name)

    def test_a_shorter_clip_comes_whole(self, tmp_path):
        Clip(counting(1), 8).write(tmp_path / "a.png")
        assert peek(tmp_path / "a.png").is_still_image

    def test_a_cut_file_is_known_by_its_start(self, tmp_path):
        Clip(counting(), 8).write(tmp_path / "a.mp4")
        with pytest.raises(ClipError, match=r"its last .* bytes are missing"):
            peek(_cut(tmp_path / "a.mp4", 0.9))
        with pytest.raises(ClipError, match="does not exist; check the path"):
            peek(tmp_path / "absent.mp4")
        with pytest.raises(RequestError, match="peek: frames must be a whole number"):
            peek(tmp_path / "a.mp4", 0)


def _cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


class TestReadingErrors:
    @pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
    @pytest.mark.parametrize(
        ("name", "codec", "layout"),
        [
            ("a.mp4", "libx264", {}),
            ("a.mp4", "libx264", {"movflags": "faststart"}),
            ("a.webm", "libvpx-vp9", {}),
            ("a.avi", "mpeg4", {}),
        ],
    )
    def test_cut_short(self, tmp_path, share, name, codec, layout):
        path = encode(tmp_path / name, counting(10), codec=codec, layout=layout)
        with pytest.raises(ClipError, match=r"Clip\.read: .*(bytes are missing|cut short)"):
            Clip.read(_cut(path, share))

    @pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".jpg"])
    @pytest.mark.parametrize("share", [0.3, 0.8, 0.97])
    def test_pictures_cut_short(self, tmp_path, suffix, share):
        noise = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
        path = tmp_path / f"a{suffix}"
        first, *rest = [Image.fromarray(frame) for frame in noise]
        first.save(
            path,
            **({"save_all": True, "append_images": rest} if suffix in {".gif", ".webp"} else {}),
        )
        with pytest.raises(
            ClipError, match=r"Clip\.read: .*(bytes are missing|cannot|ends in the middle)"
        ):
            Clip.read(_cut(path, share))

    def test_damaged_in_the_middle(self, tmp_path):
        path = encode(tmp_path / "a.mp4", counting(10))
        data = bytearray(path.read_bytes())
        at = data.index(b"mdat") + 4
        data[at : at + 900] = bytes(900)
        path.write_bytes(data)
        with pytest.raises(ClipError, match=r"must be a video that can be decoded"):
            Clip.read(path)

    def test_missing_empty_and_foreign_files(self, tmp_path):
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "text.mp4").write_text("no video at all, but words " * 50)
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "notes.txt").touch()
        cases = {
            "absent.mp4": "absent.mp4 does not exist; check the path",
            "empty.mp4": "must be a video or a picture, got an empty file",
            "text.mp4": "must be a video, a picture or a folder of images, and cannot be opened",
            "folder": r"must hold images \(\.png, .*\), got 1 files that are none",
        }
        for name, words in cases.items():
            with pytest.raises(ClipError, match=words):
                Clip.read(tmp_path / name)

    @pytest.mark.parametrize("path", [None, 7.5, "a\0b", "x" * 5000])
    def test_what_is_no_path(self, path):
        with pytest.raises(ClipError, match=r"Clip\.read: .* must be a readable path"):
            Clip.read(path)

    @pytest.mark.parametrize("name", ["a.mp4", "folder"])
    def test_not_allowed(self, tmp_path, name, monkeypatch):
        Clip(counting(), 8).write(tmp_path / name)

        def refuse(path: Path, *_: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so act it
        with pytest.raises(ClipError, match=r"must be readable \(Permission denied\); check"):
            Clip.read(tmp_path / name)

    def test_sound_only(self, tmp_path):
        with pytest.raises(ClipError, match="must hold a video stream, got audio only"):
            Clip.read(tone(tmp_path / "a.mp4"))

    def test_a_playlist_opens_no_other_file(self, tmp_path):
        encode(tmp_path / "a.mp4", counting())
        words = [
            "#EXTM3U",
            "#EXT-X-TARGETDURATION:2",
            "#EXTINF:1.0,",
            str(tmp_path / "a.mp4"),
            "#EXT-X-ENDLIST",
        ]
        (tmp_path / "list.mp4").write_text("\n".join(words))
        with pytest.raises(ClipError, match="cannot be opened"):
            Clip.read(tmp_path / "list.mp4")

    def test_images_of_two_sizes(self, tmp_path):
        for index, size in enumerate([(24, 32), (24, 32), (16, 32)]):
            Image.fromarray(counting(1, *size)[0]).save(tmp_path / f"{index}.png")
        with pytest.raises(
            ClipError,
            match=r"2\.png is of 16x32 pixels \(height x width\) where the first is of 24x32",
        ):
            Clip.read(tmp_path)

    def test_a_broken_or_moving_image_in_a_folder(self, tmp_path):
        Clip(counting(2), 8).write(tmp_path / "1.webp")
        with pytest.raises(ClipError, match=r"1\.webp has 2 frames"):
            Clip.read(tmp_path)
        (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n nonsense")
        with pytest.raises(ClipError, match=r"0\.png must be a picture that can be decoded"):
            Clip.read(tmp_path)

    def test_too_long(self, tmp_path):
        clip = Clip(counting(), 8)
        for name in ("a.mp4", "a.gif", "folder"):
            clip.write(tmp_path / name)
            assert Clip.read(tmp_path / name, max_frames=8).num_frames == 8
            with pytest.raises(
                ClipError, match="at most 7 frames, and has more; cut it, or raise max_frames"
            ):
                Clip.read(tmp_path / name, max_frames=7)
        with pytest.raises(RequestError, match="max_frames must be a whole number"):
            Clip.read(tmp_path / "a.mp4", max_frames=0)

    def test_too_big_for_memory(self, tmp_path, monkeypatch):
        Clip(counting(), 8).write(tmp_path / "a.mp4")
        monkeypatch.setattr(clip_module, "MAX_BYTES", 5 * 24 * 32 * 3)
        with pytest.raises(
            ClipError,
            match=r"6 of 24x32 pixels \(height x width\) exceed them; read it at a smaller",
        ):
            Clip.read(tmp_path / "a.mp4")
        small = Clip.read(tmp_path / "a.mp4", height=12, width=16)  # what is kept is counted
        assert small.frames.shape == (8, 12, 16, 3)

    def test_a_long_pause_does_not_fill_the_memory(self, tmp_path, monkeypatch):
        """Sampling at the rate of the quickest frame repeats the others."""
        images = [Image.fromarray(frame) for frame in counting(2)]
        images[0].save(
            tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[20, 60000]
        )
        monkeypatch.setattr(clip_module, "MAX_BYTES", 100 * 24 * 32 * 3)
        with pytest.raises(ClipError, match=r"and 3001 of 24x32 pixels .* exceed them"):
            Clip.read(tmp_path / "a.gif")
        assert levels(peek(tmp_path / "a.gif")) == [0, 1]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"height": 8}, "height and width must be given together, got height=8 and width=None"),
            ({"width": 8}, "height and width must be given together, got height=None and width=8"),
            ({"height": 0, "width": 8}, "Clip.read: height must be a whole number of at least 1"),
            ({"height": 8, "width": 2.5}, "Clip.read: width must be a whole number of at least 1"),
            ({"fit": "zoom"}, "Clip.read: fit must be one of crop, fit, stretch, got 'zoom'"),
        ],
    )
    def test_says_what_is_wrong_with_a_size(self, tmp_path, options, words):
        with pytest.raises(RequestError, match=words):
            Clip.read(tmp_path / "absent.mp4", **options)

    def test_a_rate_for_what_has_one(self, tmp_path):
        Clip(counting(), 8).write(tmp_path / "a.mp4")
        with pytest.raises(RequestError, match="has a rate of its own; leave fps out"):
            Clip.read(tmp_path / "a.mp4", fps=24)


class TestWriting:
    @pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a.webp", "a.GIF", "folder"])
    def test_comes_back(self, tmp_path, name):
        clip = Clip(counting(), 8)
        clip.write(tmp_path / name)
        again = Clip.read(tmp_path / name)
        assert again.fps == pytest.approx(8) and levels(again) == list(range(8))
        loss = 0 if name.lower().endswith((".gif", ".webp", "folder")) else 3
        assert np.abs(again.frames.astype(int) - clip.frames).mean() <= loss
        assert names(tmp_path) == [name]

    @pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
    @pytest.mark.parametrize("fps", [30000 / 1001, 24000 / 1001, 25, 7.5, 0.5, 60])
    def test_rates_come_back(self, tmp_path, name, fps):
        Clip(counting(), 8).write(tmp_path / name, fps=fps)
        again = Clip.read(tmp_path / name)
        assert again.fps == pytest.approx(fps, rel=0.002) and levels(again) == list(range(8))

    def test_one_frame(self, tmp_path):
        clip = Clip(counting(1), 8)
        for name in ("a.png", "a.gif", "a.webp", "folder"):
            clip.write(tmp_path / name)
            assert Clip.read(tmp_path / name) == clip
        clip.write(tmp_path / "a.mp4")
        assert Clip.read(tmp_path / "a.mp4").num_frames == 1

    def test_odd_sizes_repeat_the_edge(self, tmp_path):
        array = counting(3, 25, 33)
        array[:, -1], array[:, :, -1] = 200, 200
        Clip(array, 8).write(tmp_path / "a.mp4")
        again = Clip.read(tmp_path / "a.mp4").frames
        assert again.shape[1:3] == (26, 34)
        assert np.abs(again[:, -2:].astype(int) - 200).max() < 20
        assert np.abs(again[:, :, -2:].astype(int) - 200).max() < 20

    def test_scale_makes_sharp_squares(self, tmp_path):
        clip = Clip(counting(2, 4, 5), 8)
        clip.write(tmp_path / "big", scale=3)
        big = Clip.read(tmp_path / "big").frames
        np.testing.assert_array_equal(big, np.kron(clip.frames, np.ones((1, 3, 3, 1), np.uint8)))

    def test_a_gif_of_many_colours_is_close_and_does_not_flicker(self, tmp_path):
        ramp = np.linspace(0, 255, 64)
        still = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 255 - ramp[None]), axis=-1)
        frames = np.stack([still] * 4).astype(np.uint8)
        frames[:, 60:] = np.arange(4, dtype=np.uint8)[:, None, None, None] * 60  # something moves
        Clip(frames, 8).write(tmp_path / "a.gif")
        again = Clip.read(tmp_path / "a.gif").frames
        assert np.abs(again.astype(int) - frames).mean() < 8
        assert (again[:, :50] == again[:1, :50]).all()

    def test_identical_neighbours_survive_a_gif(self, tmp_path):
        frames = counting(8)[[0, 1, 1, 1, 1, 2, 3, 4]]
        for name in ("a.gif", "a.webp"):
            Clip(frames, 8).write(tmp_path / name)
            again = Clip.read(tmp_path / name)
            assert levels(again) == [0, 1, 1, 1, 1, 2, 3, 4] and again.fps == pytest.approx(8)

    def test_pictures_loop_for_ever(self, tmp_path):
        for name in ("a.gif", "a.webp"):
            Clip(counting(), 8).write(tmp_path / name)
            with Image.open(tmp_path / name) as image:
                assert image.info["loop"] == 0

    def test_a_replaced_file_and_the_usual_permissions(self, tmp_path):
        path = tmp_path / "a.mp4"
        path.write_text("old")
        Clip(counting(), 8).write(str(path))
        assert Clip.read(path).num_frames == 8
        (tmp_path / "plain").touch()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(
            (tmp_path / "plain").stat().st_mode
        )

    def test_mpeg4_where_there_is_no_h264(self, tmp_path, monkeypatch):
        monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
        for fps in (8, 30000 / 1001, 119.88):
            Clip(counting(), fps).write(tmp_path / "a.mp4")
            again = Clip.read(tmp_path / "a.mp4")
            assert levels(again) == list(range(8)) and again.fps == pytest.approx(fps, rel=0.002)
        monkeypatch.setattr(av, "codecs_available", set())
        with pytest.raises(OutputError, match=r"\.webm needs one of FFmpeg's encoders libvpx-vp9"):
            Clip(counting(), 8).write(tmp_path / "a.webm")


class TestWritingErrors:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            (
                "a.xyz",
                r"must end in one of \.mp4, .*, or in nothing for a folder of images, got '\.xyz'",
            ),
            ("a.jpg", "must end in one of"),
            ("absent/a.mp4", "absent must exist to hold 'a.mp4'; create it"),
            ("file/a.mp4", "file must exist to hold"),
            ("taken", "must be a new name or an empty folder"),
            ("taken.gif", "must be a file, and is a folder"),
            ("a.png", "can hold one frame, got 8; write .gif"),
            ("n" * 300 + ".mp4", "cannot be written"),
            ("a\0.mp4", "must name a file"),
        ],
    )
    def test_says_what_is_wrong(self, tmp_path, name, words):
        (tmp_path / "file").touch()
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "precious.txt").touch()
        (tmp_path / "taken.gif").mkdir()
        before = names(tmp_path)
        with pytest.raises(OutputError, match=words) as caught:
            Clip(counting(), 8).write(f"{tmp_path}/{name}")
        with pytest.raises(OutputError) as early:
            check_write(f"{tmp_path}/{name}", frames=8, fps=8)
        assert str(early.value) == str(caught.value)
        assert names(tmp_path) == before and (tmp_path / "taken" / "precious.txt").exists()

    @pytest.mark.parametrize("path", ["", "/", None, 3.5])
    def test_what_is_no_path(self, path):
        with pytest.raises(OutputError, match=r"Clip\.write: .* must (be a path|name a file)"):
            Clip(counting(), 8).write(path)

    @pytest.mark.parametrize(("name", "fps"), [("a.gif", 60), ("a.webp", 120)])
    def test_rates_that_a_picture_cannot_show(self, tmp_path, name, fps):
        with pytest.raises(OutputError, match=f"at most .* frames a second, got {fps}; give fps="):
            Clip(counting(), fps).write(tmp_path / name)
        with pytest.raises(OutputError, match=f"frames a second, got {fps}; give fps="):
            check_write(tmp_path / name, fps=fps)

    def test_a_target_that_will_do_is_left_alone(self, tmp_path):
        (tmp_path / "a.mp4").write_text("old")
        (tmp_path / "empty").mkdir()
        for name in ("a.mp4", "empty", "new.gif", "a.png"):
            check_write(tmp_path / name)
        check_write(tmp_path / "a.png", frames=1, fps=200)
        assert names(tmp_path) == ["a.mp4", "empty"]
        assert (tmp_path / "a.mp4").read_text() == "old"

    def test_a_folder_that_may_not_be_written(self, tmp_path, monkeypatch):
        # root may write everything, so act it
        monkeypatch.setattr(files_module.os, "access", lambda path, _: Path(path) != tmp_path)
        with pytest.raises(OutputError, match=r"Clip\.write: .*a\.mp4 cannot be written \(Perm"):
            check_write(tmp_path / "a.mp4")

    def test_options_out_of_range(self, tmp_path):
        with pytest.raises(RequestError, match="scale must be a whole number"):
            Clip(counting(), 8).write(tmp_path / "a.mp4", scale=0)
        with pytest.raises(RequestError, match="fps must be a number"):
            Clip(counting(), 8).write(tmp_path / "a.mp4", fps=0)

    def test_every_error_is_the_users(self):
        assert issubclass(ClipError, InputError) and issubclass(OutputError, InputError)
