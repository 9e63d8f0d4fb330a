import numpy as np
import pytest
from PIL import Image

from kinetiq import sheet as sheet_module
from kinetiq.clip import Clip
from kinetiq.errors import ClipError, OutputError, RequestError
from kinetiq.sheet import contact_sheet, side_by_side, write_image

CARD = np.array(sheet_module._CARD)


def coloured(frames: int = 8, height: int = 8, width: int = 8) -> Clip:
    """Frame k is of a colour of its own, which appears nowhere else on a card."""
    array = np.zeros((frames, height, width, 3), np.uint8)
    array[..., 0], array[..., 2] = 255, (10 * np.arange(frames, dtype=np.uint8))[:, None, None]
    return Clip(array, 8)


def shown(picture: np.ndarray) -> list[int]:
    """Which frames of `coloured` a picture shows, from the left."""
    places = {}
    for k in range(25):
        where = np.argwhere((picture == (255, 0, 10 * k)).all(axis=-1))
        if len(where):
            places[k] = where[:, 1].min()
    return sorted(places, key=lambda k: places[k])


def inked(picture: np.ndarray) -> np.ndarray:
    """Pixels that are not card."""
    return (picture != CARD).any(axis=-1)


def test_a_row_shows_evenly_spaced_frames_first_and_last_included():
    assert shown(contact_sheet([("a", coloured(15))], columns=8)) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert shown(contact_sheet([("a", coloured(3))], columns=8)) == [0, 1, 2]
    assert shown(contact_sheet([("a", coloured(1))])) == [0]
    assert shown(contact_sheet([("a", coloured(9))], columns=1)) == [0]


def test_frames_are_shown_whole_at_the_asked_scale():
    picture = contact_sheet([("", coloured(2, 5, 7))], scale=4)
    for k in range(2):
        assert (picture == (255, 0, 10 * k)).all(axis=-1).sum() == 5 * 7 * 16


@pytest.mark.parametrize("size", [(32, 32), (5, 90), (300, 20), (700, 900), (1, 1)])
def test_frames_of_any_size_get_a_size_that_reads_well(size):
    picture = contact_sheet([("a", coloured(2, *size))])
    where = np.argwhere((picture == (255, 0, 0)).all(axis=-1))
    side = max(where.max(axis=0) - where.min(axis=0) + 1)
    assert 96 <= side <= 192


@pytest.mark.parametrize(
    "words",
    [
        "short",
        "many words of a prompt " * 30,
        "W" * 400,
        "\nlines\nand\ttabs\n",
        "Ärger, 日本 \N{EN DASH} “x”",
    ],
)
@pytest.mark.parametrize("build", ["sheet", "grid"])
def test_labels_stay_on_the_card_and_off_the_frames(words, build):
    clip = coloured(3)
    rows = [(words, clip), ("b", clip)]
    picture = contact_sheet(rows) if build == "sheet" else side_by_side(rows).frames[0]
    ink = inked(picture)
    margin = sheet_module._MARGIN
    assert not ink[:margin].any() and not ink[-margin:].any()
    assert not ink[:, :margin].any() and not ink[:, -margin:].any()
    side = 96 if build == "sheet" else 160
    assert (picture == (255, 0, 0)).all(axis=-1).sum() == 2 * side * side  # nothing is written over


def test_a_long_label_is_wrapped_and_ends_in_an_ellipsis():
    font = sheet_module._font()
    lines = sheet_module._wrap("a red circle on a dark blue background " * 9, 200, font)
    assert len(lines) == 3 and lines[-1].endswith("...")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert sheet_module._wrap("a red circle", 200, font) == ["a red circle"]
    assert "".join(sheet_module._wrap("x" * 40, 200, font)) == "x" * 40
    assert sheet_module._wrap("café \N{EN DASH} “naïve” 日", 400, font) == ['cafe - "naive" ?']


def test_a_label_is_written_and_an_empty_one_takes_no_space():
    clip = coloured(2)
    named, bare = contact_sheet([("name", clip)]), contact_sheet([("", clip)])
    assert named.shape[0] > bare.shape[0] and named.shape[1] == bare.shape[1]
    assert not np.array_equal(named, contact_sheet([("mane", clip)]))


def test_a_grid_moves_with_its_clips():
    first, second = coloured(6), coloured(6).reverse()
    grid = side_by_side([("forth", first), ("back", second)])
    assert grid.num_frames == 6 and grid.fps == first.fps
    for k, frame in enumerate(grid.frames):
        assert shown(frame) == [k, 5 - k]


def test_a_label_is_the_same_in_every_frame():
    grid = side_by_side([("name", coloured(4)), ("a much longer name than that", coloured(4))])
    top = np.argwhere((grid.frames[0] == (255, 0, 0)).all(axis=-1))[:, 0].min()
    assert inked(grid.frames[0, : top - 1]).any()
    assert (grid.frames[:, : top - 1] == grid.frames[:1, : top - 1]).all()


@pytest.mark.parametrize(
    ("count", "columns", "expected"),
    [(1, None, 1), (4, None, 4), (5, None, 3), (9, None, 3), (5, 2, 2), (3, 8, 3)],
)
def test_the_shape_of_a_grid(count, columns, expected):
    clips = [("", Clip(np.full((1, 160, 160, 3), 250, np.uint8), 8))] * count
    grid = side_by_side(clips, columns=columns, scale=1).frames[0]
    bright = (grid == 250).all(axis=-1)
    assert bright.sum() == count * 160 * 160
    assert bright.sum(axis=1).max() == expected * 160


def test_clips_of_different_sizes_share_a_grid():
    clips = [("a", coloured(2, 8, 20)), ("b", coloured(2, 20, 8)), ("c", coloured(2, 400, 700))]
    assert side_by_side(clips, columns=2).num_frames == 2


def test_a_grid_survives_a_gif(tmp_path):
    grid = side_by_side([("forth", coloured(4)), ("back", coloured(4).reverse())])
    grid.write(tmp_path / "grid.gif")
    assert Clip.read(tmp_path / "grid.gif") == grid


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: contact_sheet([]),
            r"contact_sheet: rows must be pairs of label and clip, at least one, got \[\]",
        ),
        (lambda: contact_sheet([("a", 3)]), r"pairs \(label, Clip\), and number 0 is \('a', 3\)"),
        (lambda: contact_sheet([coloured()]), "number 0 is Clip"),
        (
            lambda: contact_sheet([("a", coloured())], columns=0),
            "columns must be a whole number of at least 1, got 0",
        ),
        (
            lambda: contact_sheet([("a", coloured())], scale=1.5),
            "scale must be a whole number of at least 1, got 1.5",
        ),
        (lambda: side_by_side([]), "side_by_side: clips must be pairs"),
        (lambda: side_by_side([("a", coloured())], columns=-1), "columns must be"),
    ],
)
def test_says_what_is_wrong(make, words):
    with pytest.raises(RequestError, match=words):
        make()


def test_clips_of_a_grid_have_one_length():
    with pytest.raises(ClipError, match=r"must have 4 frames .* 'b' has 5; use resample\(4\)"):
        side_by_side([("a", coloured(4)), ("b", coloured(5))])


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.PNG", "a.jpg"])
def test_pictures_are_written_under_their_name_only(tmp_path, name):
    picture = contact_sheet([("a", coloured())])
    write_image(picture, tmp_path / name)
    with Image.open(tmp_path / name) as image:
        again = np.asarray(image.convert("RGB"))
    assert again.shape == picture.shape
    assert name == "a.jpg" or np.array_equal(again, picture)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("array", "name", "error", "words"),
    [
        (
            np.zeros((4, 4, 3)),
            "a.png",
            ClipError,
            r"must be uint8 \[height, width, 3\], got float64 \[4, 4, 3\]",
        ),
        (np.zeros((4, 4), np.uint8), "a.png", ClipError, r"got uint8 \[4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), "a.png", ClipError, r"got uint8 \[0, 4, 3\]"),
        (None, "a.png", ClipError, "got None"),
        (
            np.zeros((4, 4, 3), np.uint8),
            "a.mp4",
            OutputError,
            r"must end in one of \.png, \.jpg, \.jpeg, \.webp, got '\.mp4'",
        ),
        (
            np.zeros((4, 4, 3), np.uint8),
            "absent/a.png",
            OutputError,
            "write_image: the folder .*absent must exist",
        ),
    ],
)
def test_says_what_cannot_be_written(tmp_path, array, name, error, words):
    with pytest.raises(error, match=words):
        write_image(array, tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_path_that_is_none():
    with pytest.raises(OutputError, match="write_image: None must be a path"):
        write_image(np.zeros((4, 4, 3), np.uint8), None)
