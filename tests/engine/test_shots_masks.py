"""Where a subject is: Otsu's threshold, attention to words, and masks that a user gives."""

import math

import numpy as np
import pytest
import tiny
import torch

from kinetiq.attention import attention_to_words
from kinetiq.errors import RequestError, WorkError
from kinetiq.subject_masks import (
    attention_map,
    drop_places,
    find_masks,
    fit_masks,
    otsu_threshold,
    subject_masks,
)
from kinetiq.text import find_words


def slow_otsu(values):
    cuts = sorted(set(values))[1:]
    if not cuts:
        return values[0]

    def between(cut):
        low, high = [v for v in values if v < cut], [v for v in values if v >= cut]
        return len(low) * len(high) * (sum(high) / len(high) - sum(low) / len(low)) ** 2

    return max(cuts, key=between)  # the first of equal ones


CASES = {
    "two heaps": [0.1, 0.12, 0.09, 0.8, 0.81, 0.79, 0.11],
    "one apart": [1.0, 1.1, 1.2, 1.05, 9.0],
    "equal values": [0.0] * 5 + [1.0] * 3,
    "three values": [0.0, 0.0, 1.0, 1.0, 5.0, 5.0],
    "far from zero": [1e6 + v for v in (0.0, 1.0, 2.0, 30.0, 31.0)],
    "one": [0.3],
    "all equal": [0.5] * 4,
}


@pytest.mark.parametrize("name", CASES)
def test_otsu_agrees_with_brute_force(name):
    values = CASES[name]
    assert otsu_threshold(torch.tensor(values, dtype=torch.float64)).item() == slow_otsu(values)


@pytest.mark.parametrize("seed", range(8))
def test_otsu_agrees_with_brute_force_on_noise(seed):
    noise = torch.randn(60, generator=torch.Generator().manual_seed(seed)).double()
    values = (noise * (3 if seed % 2 else 40)).round() if seed < 6 else noise  # with ties, without
    assert otsu_threshold(values.view(3, 20)).item() == slow_otsu(values.tolist())


def test_masks_are_cut_shot_by_shot_by_all_its_frames():
    maps = torch.tensor([[[[0.1, 0.9]], [[0.2, 0.15]]], [[[7.0, 9.0]], [[9.5, 7.2]]]])
    assert subject_masks(maps).tolist() == [[[[0, 1]], [[0, 0]]], [[[0, 1]], [[1, 0]]]]


def test_attention_to_words_agrees_with_its_definition():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 4, 6, generator=generator)
    key = torch.randn(3, 1, 5, 6, generator=generator)
    words = torch.tensor([[0, 0.5, 0.5, 0, 0], [0, 0, 0, 1.0, 0]])
    got = attention_to_words(query, key, 2, torch.tensor([2, 0]), words)
    for n, row in enumerate((2, 0)):
        for frame in range(2):
            for x in range(4):
                total = 0.0
                for head in (slice(0, 3), slice(3, 6)):
                    scores = [
                        float(query[row, frame, x, head].double() @ k.double()) / math.sqrt(3)
                        for k in key[row, 0, :, head]
                    ]
                    weights = [math.exp(score) for score in scores]
                    paid = sum(w * float(word) for w, word in zip(weights, words[n], strict=True))
                    total += paid / sum(weights) / 2
                assert got[n, frame, x].item() == pytest.approx(total, rel=1e-5)


def test_attention_to_words_does_not_wait_for_the_values_of_its_rows():
    query, key = torch.zeros(3, 2, 4, 6, device="meta"), torch.zeros(3, 1, 5, 6, device="meta")
    rows = torch.zeros(2, dtype=torch.int64, device="meta")  # has no values to wait for
    got = attention_to_words(query, key, 2, rows, torch.zeros(2, 5, device="meta"))
    assert got.shape == (2, 2, 4)


def test_the_map_is_the_mean_over_sites_at_the_latents_size():
    fine = torch.rand(2, 3, 24, generator=torch.Generator().manual_seed(0))
    coarse = torch.rand(2, 3, 1, generator=torch.Generator().manual_seed(1))
    got = attention_map({4: fine, 9: coarse}, (4, 6))
    wanted = (fine.unflatten(2, (4, 6)) + coarse[..., None]) / 2
    assert torch.allclose(got, wanted)


def test_given_masks_are_averaged_over_the_area_of_a_latent():
    still = np.zeros((8, 8))
    still[:4, :2] = 1
    moving = np.ones((3, 4, 4))
    fitted = fit_masks([still, moving], (3, 4, 4), 2)
    assert fitted.shape == (2, 3, 4, 4)
    assert fitted[0, 2, :, 0].tolist() == [1, 1, 0, 0]
    assert fitted[0, 2, :, 1].tolist() == [0] * 4
    assert bool((fitted[1] == 1).all())


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ([np.ones((4, 4))], "one array for each of 2 shots, got 1"),
        (7, "one array for each of 2 shots, got int"),
        (np.array(7.0), "one array for each of 2 shots, got ndarray"),
        (torch.tensor(7.0), "one array for each of 2 shots, got Tensor"),
        ([np.ones((4, 4)), np.ones((2, 4, 4))], r"shot 2 must be .*frames = 3.*got \[2, 4, 4\]"),
        ([np.ones(4), np.ones((4, 4))], r"shot 1 must be .*got \[4\]"),
        ([np.ones((4, 4)), np.full((4, 4), 2.0)], "shot 2 must hold numbers from 0 to 1"),
        ([np.ones((4, 4)), np.full((4, 4), np.nan)], "shot 2 must hold numbers from 0 to 1"),
        ([np.ones((4, 4)), "everywhere"], "shot 2 must be an array of numbers"),
        ([np.ones((4, 4)), np.ones((0, 4))], "shot 2 must be"),
    ],
)
def test_masks_that_do_not_fit_are_named(masks, words):
    with pytest.raises(RequestError, match=words):
        fit_masks(masks, (3, 4, 4), 2)


def test_what_a_callable_raises_is_the_cause_of_an_error_of_its_board():
    def find(_):
        raise KeyError("no model")

    words = "callable must return one array for each of 1 shots, and raised KeyError: 'no model'"
    with pytest.raises(WorkError, match=words) as caught:
        find_masks(find, (np.zeros((3, 8, 8, 3), np.float32),), (3, 4, 4))
    assert isinstance(caught.value.__cause__, KeyError)


def test_dropped_places_are_the_same_for_the_same_seed():
    masks = torch.ones(2, 8, 16, 16)
    once = drop_places(masks, 0.5, (3, 4), 7)
    assert torch.equal(once, drop_places(masks, 0.5, (3, 4), 7))
    assert torch.equal(once[1:], drop_places(masks[1:], 0.5, (4,), 7))
    assert not torch.equal(once, drop_places(masks, 0.5, (3, 4), 8))
    assert not torch.equal(once[0], once[1])
    spread = math.sqrt(0.25 / masks[0].numel())
    assert abs(once[0].mean().item() - 0.5) < 5 * spread
    assert drop_places(masks, 0.0, (3, 4), 7) is masks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a ring moving left", "a ring"),
        ("A  RING, moving left", "a ring"),
        ("still: a striped ring", "striped ring"),
        ("a ring", "a ring"),
    ],
)
def test_words_are_found_by_their_tokens(tokenizer, prompt, words):
    positions = find_words(tokenizer, prompt, words)
    tokens = tokenizer([prompt]).input_ids[0]
    assert [tokens[position] for position in positions] == tokenizer([words]).input_ids[0][1:-1]


def test_words_are_found_wherever_they_are(tokenizer):
    once = find_words(tokenizer, "a ring and a circle and a ring", "ring")
    tokens = tokenizer(["a ring and a circle and a ring"]).input_ids[0]
    assert len(once) == 2
    assert tokens[once[0]] == tokens[once[1]]


def test_words_that_are_not_read_are_not_found(tokenizer):
    long = "a red circle " * 40 + "a ring"
    with pytest.raises(RequestError, match=r"tokens of a prompt that are read must hold 'a ring'"):
        find_words(tokenizer, long, "a ring")
    with pytest.raises(RequestError, match="must hold 'ring'"):
        find_words(tokenizer, "a rings", "ring")
