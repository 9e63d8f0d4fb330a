"""The tiny models are not degenerate: each kind of layer changes what comes out."""

import pytest
import tiny
import torch
from torch import Tensor


@pytest.mark.parametrize("family", ["animatediff", "unet3d"])
def test_frames_text_and_time_matter(family: str):
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    network = {"animatediff": tiny.tiny_animatediff, "unet3d": tiny.tiny_unet3d}[family](seed=1)
    assert torch.equal(torch.get_rng_state(), state)

    def predict(latents: Tensor, time: int, text: Tensor) -> Tensor:
        rows = text.repeat_interleave(6, dim=0) if family == "animatediff" else text
        with torch.no_grad():
            return network(latents, torch.tensor([time]), rows).sample

    latents = torch.randn(1, 4, 6, 8, 8, generator=generator)
    text = torch.randn(1, 5, tiny.CROSS_WIDTH, generator=generator)
    plain = predict(latents, 300, text)
    assert 0.2 < plain.std() < 5.0
    shifted = latents.clone()
    shifted[:, :, 0] += 1.0
    assert (predict(shifted, 300, text) - plain)[:, :, 1:].std() > 0.05  # temporal layers
    assert (predict(latents, 300, text.flip(-1)) - plain).std() > 0.05  # cross-attention
    assert (predict(latents, 900, text) - plain).std() > 0.05
