"""Fixtures of the engine's tests: tiny networks and engines of both families."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import tiny
from torch import nn

import kinetiq as kq
from kinetiq.denoiser import EagerDenoiser


@pytest.fixture(params=tiny.NETWORKS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def engine(tiny_folder, family: str) -> Iterator[kq.Engine]:
    with kq.Engine.load(tiny_folder(family)) as loaded:
        yield loaded


@pytest.fixture
def reference() -> kq.Clip:
    rng = np.random.default_rng(0)
    return kq.Clip.from_array(rng.integers(0, 255, (4, 16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """One network a family; every test leaves it as it was."""
    return {family: build() for family, build in tiny.NETWORKS.items()}


@pytest.fixture
def denoiser(networks: dict[str, nn.Module], family: str) -> Iterator[EagerDenoiser]:
    """Attached; the test takes its own hooks off, and so does what it tests."""
    made = EagerDenoiser(networks[family]).attach()
    yield made
    hooked = [
        name
        for name, module in made.detach().named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    assert not hooked


@pytest.fixture(params=[0o022, 0o077], ids=["umask 022", "umask 077"])
def file_mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """The permissions of a new file, under a umask that is set for the test."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)
