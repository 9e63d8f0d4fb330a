"""Where Triton is missing, the CPU paths work and a launch says what to install."""

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None  # as on a system that has no package of it
import torch
from kinetiq.errors import MissingDependencyError
from kinetiq.kernels import (
    frame_attention,
    guided_step,
    motion_feature,
    query_attention,
    temporal_block,
)
from kinetiq.kernels._triton import triton

q = torch.randn(2, 3, 5, 16)
assert query_attention(q, q, q, heads=2).shape == q.shape
assert frame_attention(q, q, q, heads=2).shape == q.shape
assert motion_feature(q).shape == q.shape
norm, weight = torch.ones(16), torch.eye(16)
assert temporal_block(q, norm, norm, *[weight] * 4, norm, heads=2).shape == q.shape
guided_step(q, q, q, q, q, torch.ones(2), torch.ones(2, 6))
kernel = triton.jit(lambda x: x)
try:
    kernel[(1,)](q)
except MissingDependencyError as error:
    print(error)
"""


def test_the_cpu_paths_work_without_triton(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Triton must be installed to run on a GPU" in done.stdout
