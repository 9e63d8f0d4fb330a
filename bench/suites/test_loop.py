"""Times of the denoising loop on the embedded network: `pytest bench/suites --benchmark-enable`."""

import pytest

from kinetiq.bench.query_cost import embedded_loop
from kinetiq.motion_injection import MotionInjection
from kinetiq.query_injection import QueryInjection


@pytest.fixture(scope="module")
def loop():
    return embedded_loop("cpu")


@pytest.mark.parametrize("way", ["plain", "query", "motion", "recorded"])
def test_one_clip(benchmark, loop, way):
    controls = {
        "query": QueryInjection(loop.reference, until=0.4),
        "motion": MotionInjection(loop.reference),
    }
    if way == "recorded":
        benchmark.pedantic(loop.run_recorded, rounds=3)
    else:
        benchmark.pedantic(loop.run, (controls.get(way),), rounds=3)
