"""Traces whose sizes are not known, as those of users who compile graphs of their own."""

import pytest
import torch

from kinetiq.kernels import frame_attention, motion_feature, query_attention

CALLS = {
    "region": lambda x, region: motion_feature(x, region=region),
    "query_blend": lambda x, blend: query_attention(
        x, x, x, heads=2, query_row=torch.tensor([1, 2, 0]), query_blend=blend
    ),
    "deviation_blend": lambda x, blend: frame_attention(
        x, x, x, heads=2, deviation_row=torch.tensor([1, 2, 0]), deviation_blend=blend
    ),
    "key": lambda x, key: query_attention(x, key, key, heads=2),
}
SHAPES = {"region": (5,), "query_blend": (3,), "deviation_blend": (3,), "key": (3, 2, 7, 8)}


class Call(torch.nn.Module):
    """A call with a buffer, whose size is known beside that of an input, which is not."""

    def __init__(self, name):
        super().__init__()
        self.call = CALLS[name]
        self.register_buffer("buffer", torch.rand(SHAPES[name]))

    def forward(self, x):
        return self.call(x, self.buffer)


@pytest.mark.parametrize("name", CALLS)
def test_a_size_that_a_trace_does_not_know_is_not_refused(name):
    torch._dynamo.reset()
    call, x = Call(name), torch.rand(3, 2, 5, 8)
    traced = torch.compile(call, backend="eager", dynamic=True, fullgraph=True)
    torch.testing.assert_close(traced(x), call(x))
