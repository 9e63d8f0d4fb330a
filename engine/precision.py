"""Float32 that is float32 on a GPU too."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block, convolutions of float32 are done in float32; also as a decorator.

    PyTorch lets cuDNN round what they are given to TF32, 10 bits after the point, by default,
    which errs by about a thousandth. Who wants speed asks for float16 or bfloat16.
    """
    if torch.compiler.is_compiling():  # whoever compiles has the block around what runs
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
        fp32_precision=None,  # which is of products of matrices too, and stays
    ):
        yield
