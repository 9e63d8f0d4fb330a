"""Masks at a site's resolution, and the indices that mean no injection."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetiq.control_tensors import (
    ControlTensors,
    KeyValueBank,
    KeyValueControl,
    QueryControl,
    at_site,
    no_injection,
)


def test_no_injection_is_every_rows_own_index():
    row = no_injection(3, 4)
    assert row.dtype == torch.int64
    assert row.tolist() == [[0, 1, 2, 3]] * 3
    row[1, 2] = 0  # rows of the table are not views of one another
    assert row.tolist() == [[0, 1, 2, 3], [0, 1, 0, 3], [0, 1, 2, 3]]


def test_no_control_is_no_tensor():
    assert ControlTensors() == ControlTensors(query=None, deviation=None)
    control = QueryControl(no_injection(1, 2), torch.ones(2))
    assert control.reduced is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        control.blend = torch.zeros(2)


def test_a_mask_of_the_sites_size_is_itself(cpu_rng):
    mask = torch.rand(2, 3, 4, 5, generator=cpu_rng)
    assert torch.equal(at_site(mask, 20), mask.reshape(2, 3, 20))


def test_a_token_holds_the_mean_over_its_area():
    mask = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert at_site(mask, 4).tolist() == [[[2.5, 4.5, 10.5, 12.5]]]
    assert at_site(mask, 1).tolist() == [[[7.5]]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3), st.integers(0, 2**31))
def test_follows_the_networks_halving_at_any_size(height, width, level, seed):
    """A stride-2 convolution with padding 1 rounds up; masks must too, at each level."""
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.rand(1, 2, height, width, generator=rng) > 0.5).float()
    features = torch.zeros(1, 1, height, width)
    for _ in range(level):
        features = torch.nn.functional.conv2d(features, torch.zeros(1, 1, 3, 3), None, 2, 1)
    tokens = features[0, 0].numel()
    got = at_site(mask, tokens)
    assert got.shape == (1, 2, tokens)
    assert ((got >= 0) & (got <= 1)).all()
    assert torch.equal(at_site(torch.ones_like(mask), tokens), torch.ones(1, 2, tokens))
    if height % 2**level == 0 and width % 2**level == 0:  # then areas are equal
        torch.testing.assert_close(got.mean(-1), mask.mean((2, 3)))


def test_given_keys_and_values_are_a_kind_that_costs_nothing_unused():
    assert ControlTensors().key_value is None
    bank = KeyValueBank(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    control = KeyValueControl(torch.tensor([0, 1]), {5: bank})
    assert ControlTensors(key_value=control) != ControlTensors()  # fused paths must see it
    with pytest.raises(dataclasses.FrozenInstanceError):
        control.slot = torch.zeros(2)
