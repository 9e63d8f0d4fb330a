"""Times of the operators at the embedded shapes: `pytest bench/suites --benchmark-enable`."""

import pytest
import torch

from kinetiq.kernels import frame_attention, guided_step, query_attention

ROWS, FRAMES = 6, 8
SHAPES = {"16x16x64": (256, 64, 2), "8x8x128": (64, 128, 4), "4x4x128": (16, 128, 4)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def site(request):
    tokens, width, heads = request.param
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn((3, ROWS, FRAMES, tokens, width), generator=generator)
    return *parts.unbind(), heads


@pytest.mark.parametrize("control", ["none", "query_row"])
def test_query_attention(benchmark, site, control):
    query, key, value, heads = site
    row = torch.full((ROWS,), ROWS - 1) if control == "query_row" else None
    out = benchmark(query_attention, query, key, value, heads=heads, query_row=row)
    assert out.shape == query.shape


@pytest.mark.parametrize("control", ["none", "deviation_row"])
def test_frame_attention(benchmark, site, control):
    query, key, value, heads = site
    row = torch.full((ROWS,), ROWS - 1) if control == "deviation_row" else None
    out = benchmark(frame_attention, query, key, value, heads=heads, deviation_row=row)
    assert out.shape == query.shape


def test_guided_step(benchmark):
    tensors = torch.randn(5, 8, 4, FRAMES, 16, 16)
    coefficients, scale = torch.rand(8, 6), torch.full((8,), 3.0)
    following, clean = benchmark(guided_step, *tensors.unbind(), scale, coefficients)
    assert following.shape == clean.shape == tensors.shape[1:]
