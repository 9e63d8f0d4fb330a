import pytest

from kinetiq.sprites import components, world


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return components.build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_word_of_the_world_is_one_token(tokenizer):
    for word in components.vocabulary_words():
        start, token, end = tokenizer(word).input_ids
        assert tokenizer.decode([token]).strip() == word
        assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_captions_fit_and_other_text_is_spelt_out(tokenizer):
    longest = world.Caption(
        (world.Mention("circle", "purple", "striped", "circling"),) * 2, "purple"
    ).text
    assert len(tokenizer(longest).input_ids) <= components.MAX_TOKENS
    ids = tokenizer("a zebra, naïve").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "azebra,naïve"


def test_the_checkpoint_fits_in_the_package(tokenizer):
    parts = [
        components.build_unet(),
        components.build_vae(),
        components.build_text_encoder(len(tokenizer), tokenizer.eos_token_id),
    ]
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    assert 2 * parameters < 25e6  # bytes in fp16
