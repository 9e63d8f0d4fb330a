"""Engines on disk: what they were built for, and who vouches for them."""

import json
import stat
from dataclasses import replace

import pytest
from one_node import make_metadata

from kinetiq.errors import CheckpointError, KinetiqWarning, OutputError, RequestError, ShapeError
from kinetiq.export import engine_file
from kinetiq.export.engine_file import (
    EngineRecord,
    NotVouchedForError,
    read_engine,
    write_engine,
)
from kinetiq.export.engine_profile import Bounds, Profile, make_profile
from kinetiq.export.gpu import Gpu
from kinetiq.export.metadata import TensorInfo

LATENTS = TensorInfo("latents", "float16", ("rows", 4, "frames", "height", "width"))
BLEND = TensorInfo("query_blend.1", "float32", ("rows", "frames", "tokens_1"))
VALUE = TensorInfo("motion.a.value", "float16", ("motion_slots", "frames", "motion_tokens_1", 8))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def record():
    metadata = make_metadata((LATENTS,), (replace(LATENTS, name="prediction"),))
    return EngineRecord(
        format=engine_file.FORMAT,
        kinetiq="0.1.0",
        runtime="tensorrt-rtx",
        version="1.7.1",
        target="sm_89",
        profile=make_profile(metadata, {"rows": Bounds(1, 2, 3)}),
        network=metadata,
        plugins=("query_attention",),
        route="sm_80",
        attentions=2,
        fused=2,
        left_out={"motion_feature": "why"},
        gpu=Gpu("a GPU", 82),
    )


def test_what_is_written_is_read(tmp_path, record):
    written = write_engine(tmp_path / "net.engine", b"plan", record)
    found, plan = read_engine(tmp_path / "net.engine")
    assert plan == b"plan"
    assert found == written
    assert found.record == record


def test_nobody_vouches_for_what_came_from_elsewhere(tmp_path, record, cache):
    written = write_engine(tmp_path / "net.engine", b"plan", record)
    (cache / "kinetiq" / "engines" / "trusted.txt").unlink()
    with pytest.raises(
        NotVouchedForError, match=rf"vouches for.*give its checksum: {written.checksum}"
    ):
        read_engine(tmp_path / "net.engine")
    with pytest.raises(CheckpointError, match="vouches for"):
        read_engine(tmp_path / "net.engine", trust="0" * 64)
    assert read_engine(tmp_path / "net.engine", trust=written.checksum)[1] == b"plan"
    assert read_engine(tmp_path / "net.engine", trust=[written.checksum])[1] == b"plan"


def test_several_engines_are_vouched_for(tmp_path, record):
    every = [write_engine(tmp_path / f"{name}.engine", name.encode(), record) for name in "ab"]
    assert engine_file.vouched_for() == {one.checksum for one in every}


def swap_plan(path, beside):
    path.write_bytes(b"other")


def swap_target(path, beside):
    text = beside.read_text()
    assert text.count("sm_89") == 1
    beside.write_text(text.replace("sm_89", "sm_80"))


def cut_off(path, beside):
    beside.write_text(beside.read_text()[:-10])


def no_record(path, beside):
    beside.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_plan, "were changed or damaged"),
        (swap_target, "were changed or damaged"),
        (cut_off, "must be the record of an engine"),
        (no_record, r"\.json is not; build it with"),
    ],
)
def test_a_tampered_engine(tmp_path, record, change, words):
    path = tmp_path / "net.engine"
    write_engine(path, b"plan", record)
    (beside,) = engine_file.list_records(path)
    change(path, beside)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_engine(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 4}, "format 3, got 4"),
        ({"network": "{}"}, "metadata must be what"),
        ({"profile": {}}, "record must be what"),
        ({"profile": {"bounds": []}}, "record must be what"),
        ({"profile": {"bounds": {}}}, r"KeyError\('rows'\)"),
        ({"profile": {"bounds": {"rows": ["1", "2", "3"]}}}, "least must be int, got '1'"),
        ({"runtime": 5}, "runtime must be str, got 5"),
        ({"plugins": [5]}, "plugins must be str, got 5"),
        ({"left_out": {"a": 5}}, r"left_out\.a must be str, got 5"),
        ({"gpu": {"name": 5, "multiprocessors": 5}}, "name must be str, got 5"),
        ({"fused": True}, r"fused must be int \| None, got True"),
    ],
)
def test_another_record(tmp_path, record, change, words):
    path = tmp_path / "net.engine"
    write_engine(path, b"plan", record)
    (beside,) = engine_file.list_records(path)
    entries = json.loads(beside.read_text())
    said = json.dumps(json.loads(entries["record"]) | change)
    checksum = engine_file._checksum(said, b"plan")
    beside.write_text(json.dumps({"record": said, "checksum": checksum}))
    with pytest.raises(CheckpointError, match=words):
        read_engine(path, trust=checksum)


@pytest.mark.parametrize("path", ["a\0b", "", "/", 5, None, "\ud800"])
def test_what_is_no_path_of_an_engine_is_refused(path):
    with pytest.raises(CheckpointError, match=r"^engine: must be the path of a file, got "):
        read_engine(path)


def test_a_folder_is_no_engine(tmp_path):
    with pytest.raises(CheckpointError, match=r"must be readable: Is a directory; build"):
        read_engine(tmp_path)


def test_records_of_endless_depth_are_refused(tmp_path, record):
    path = tmp_path / "net.engine"
    write_engine(path, b"plan", record)
    (beside,) = engine_file.list_records(path)
    beside.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="must be the record of an engine"):
        read_engine(path)


def test_a_plan_without_its_record_never_carries_the_name(tmp_path, record, monkeypatch):
    def fail(*_):
        raise RequestError("no room")

    monkeypatch.setattr(engine_file, "write_text", fail)
    with pytest.raises(RequestError, match="no room"):
        write_engine(tmp_path / "net.engine", b"plan", record)
    assert not (tmp_path / "net.engine").exists()


def test_two_that_write_one_engine_at_a_time_leave_one_that_is_whole(tmp_path, record, monkeypatch):
    path, write_text = tmp_path / "net.engine", engine_file.write_text
    other = replace(record, target="sm_80")

    def overtaken(*given):
        write_text(*given)
        monkeypatch.setattr(engine_file, "write_text", write_text)
        write_engine(path, b"other", other)  # all of it between this record and its plan

    monkeypatch.setattr(engine_file, "write_text", overtaken)
    write_engine(path, b"plan", record)
    found, plan = read_engine(path)
    assert (found.record, plan) == (record, b"plan")


def test_who_comes_back_before_the_former_is_removed_keeps_its_record(
    tmp_path, record, monkeypatch
):
    path, look = tmp_path / "net.engine", engine_file._record_of
    write_engine(path, b"one", record)
    looks = []

    def overtaken(file):
        looks.append(file)
        if len(looks) == 2:  # the second engine is there, and the record of the first still is
            write_engine(path, b"one", record)
        return look(file)

    monkeypatch.setattr(engine_file, "_record_of", overtaken)
    write_engine(path, b"two", record)
    assert read_engine(path)[1] == b"one"


def test_an_engine_in_the_place_of_another_leaves_nothing_of_it(tmp_path, record):
    path = tmp_path / "net.engine"
    for plan in (b"one", b"two", b"two"):
        written = write_engine(path, plan, record)
        assert read_engine(path)[0] == written
        assert len(engine_file.list_records(path)) == 1


def test_an_engine_is_vouched_for_before_it_is_there(tmp_path, record, monkeypatch):
    monkeypatch.setattr(engine_file, "vouch", lambda _: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OutputError, match="killed"):
        write_engine(tmp_path / "net.engine", b"plan", record)
    assert not (tmp_path / "net.engine").exists()


def test_who_is_not_to_vouch_does_not(tmp_path, record):
    written = write_engine(tmp_path / "net.engine", b"plan", record, vouched=False)
    assert engine_file.vouched_for() == set()
    assert read_engine(tmp_path / "net.engine", trust=written.checksum)[0] == written


def test_checksums_that_others_may_write_are_not_used(tmp_path, record):
    path = tmp_path / "net.engine"
    write_engine(path, b"plan", record)
    folder = engine_file.engine_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o770)
    words = "must be a folder that you own and nobody else can write, .*; chmod 700 "
    with pytest.warns(KinetiqWarning, match=words):
        assert engine_file.vouched_for() == set()
    with pytest.warns(KinetiqWarning, match=words):
        engine_file.vouch("0" * 64)
    folder.chmod(0o700)
    assert "0" * 64 not in engine_file.vouched_for()
    read_engine(path)


def test_checksums_that_cannot_be_read(tmp_path, record):
    path = tmp_path / "net.engine"
    written = write_engine(path, b"plan", record)
    trusted = engine_file.engine_folder() / "trusted.txt"
    trusted.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"trusted.txt must be readable, .* can't decode"):
        read_engine(path)
    trusted.unlink()
    trusted.mkdir()
    with pytest.raises(CheckpointError, match=r"trusted.txt must be readable, .*: Is a directory"):
        read_engine(path)
    assert read_engine(path, trust=written.checksum)[0] == written  # which needs no list


def test_a_profile_follows_from_what_is_asked():
    metadata = replace(make_metadata((LATENTS, BLEND, VALUE), ()), levels=2)
    asked = {"height": Bounds(2, 4, 6), "width": Bounds(2, 2, 10), "frames": Bounds(1, 8, 8)}
    profile = make_profile(metadata, asked)
    # levels halve height and width, rounding up: 2x2, 4x2 and 6x10 become 1x1, 2x1 and 3x5
    assert profile.bounds["tokens_1"] == Bounds(1, 2, 15)
    assert profile.bounds["motion_tokens_1"] == Bounds(1, 1, 15)
    assert profile.shapes(LATENTS) == ([1, 4, 1, 2, 2], [2, 4, 8, 4, 2], [4, 4, 8, 6, 10])
    assert profile.shapes(VALUE) == ([1, 1, 1, 8], [1, 8, 1, 8], [5, 8, 15, 8])


@pytest.mark.parametrize(("family", "frames"), [("animatediff", 16), ("unet3d", 24)])
def test_what_is_not_asked_for_is_what_our_kernels_can_be(family, frames):
    metadata = replace(make_metadata((LATENTS, VALUE), ()), levels=2, family=family)
    assert make_profile(metadata, {}).bounds["frames"] == Bounds(1, frames, 32)


@pytest.mark.parametrize(
    ("known", "frames"), [(None, (1, 16, 32)), (48, (1, 16, 32)), (24, (1, 16, 24)), (8, (1, 8, 8))]
)
def test_an_engine_takes_no_more_frames_than_the_network_knows(known, frames):
    metadata = replace(make_metadata((LATENTS,), ()), positions=known)
    assert make_profile(metadata, {}).bounds["frames"] == Bounds(*frames)
    asked = {"frames": Bounds(1, 8, 64)}
    if known is None:
        assert make_profile(metadata, asked).bounds["frames"] == asked["frames"]
    else:
        with pytest.raises(RequestError, match=rf"frames must be at most {known}, .*\(1, 8, 64\)"):
            make_profile(metadata, asked)


def test_each_row_may_have_a_motion_of_its_own():
    metadata = replace(make_metadata((LATENTS, VALUE), ()), levels=2)
    for rows in (Bounds(1, 2, 4), Bounds(1, 2, 16)):
        slots = make_profile(metadata, {"rows": rows}).bounds["motion_slots"]
        assert slots == Bounds(1, 1, rows.most + 1)  # the first is that of no motion


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"depth": Bounds(1, 1, 1)}, "axes must be among frames, height, .*, got depth"),
        ({"tokens_1": Bounds(1, 1, 1)}, "got tokens_1"),
        ({"rows": Bounds(2, 1, 4)}, r"1 <= least <= best <= most <= 2147483647, got \(2, 1, 4\)"),
        ({"rows": Bounds(0, 1, 4)}, "1 <= least"),
        ({"height": Bounds(2, 4, 7)}, r"multiples of 2, got \(2, 4, 7\)"),
    ],
)
def test_a_profile_that_cannot_be(asked, words):
    metadata = replace(make_metadata((LATENTS, BLEND), ()), levels=2)
    with pytest.raises(RequestError, match=words):
        make_profile(metadata, asked)


@pytest.mark.parametrize(("text", "bounds"), [("1:2:4", (1, 2, 4)), ("7", (7, 7, 7))])
def test_bounds_from_words(text, bounds):
    assert Bounds.parse(text, "rows") == bounds


@pytest.mark.parametrize("text", ["", "1:2", "a:b:c", "-1", "3:2:1", "1:2:3:4", "1.5"])
def test_bounds_that_are_none(text):
    with pytest.raises(RequestError, match=r"profile: rows must be"):
        Bounds.parse(text, "rows")


def test_a_shape_outside_the_profile_is_told_the_bounds():
    profile = Profile(
        {"rows": Bounds(1, 2, 4), "frames": Bounds(2, 8, 16), "tokens_1": Bounds(4, 4, 4)}
    )
    profile.check(BLEND, (4, 2, 4))
    words = (
        r"query_blend.1 must be \[rows 1 to 4, frames 2 to 16, tokens_1 4 to 4\] .* got \[5, 2, 4\]"
    )
    for shape in ((5, 2, 4), (4, 1, 4), (4, 2, 5), (4, 2)):
        with pytest.raises(ShapeError, match=words if shape == (5, 2, 4) else "query_blend.1"):
            profile.check(BLEND, shape)
