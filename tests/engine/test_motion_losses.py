"""Every loss against its definition, written out."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from kinetiq.errors import RequestError, ShapeError
from kinetiq.motion_losses import LOSSES, Diffusion, motion_loss, read_diffusion
from kinetiq.sampler import SAMPLERS

SHAPE = (2, 3, 5, 4, 2)  # rows, channels, frames, h, w


def pair(shape=SHAPE, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for _ in "ab")


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def plain_mse(guess, target, _):
    return mean((a - b) ** 2 for a, b in zip(guess.flatten(), target.flatten(), strict=True))


def plain_debiased(guess, target, anchor):
    def without(x):
        return torch.stack(
            [math.sqrt(2) * x[:, :, f] - x[:, :, anchor] for f in range(x.shape[2])], dim=2
        )

    return plain_mse(guess, target, None) + plain_mse(without(guess), without(target), None)


def plain_vmc(guess, target, _):
    angles = []
    for row in range(guess.shape[0]):
        for frame in range(guess.shape[2] - 1):
            a, b = ((x[row, :, frame + 1] - x[row, :, frame]).flatten() for x in (guess, target))
            angles.append(1 - (a @ b) / (a.norm() * b.norm()))
    return mean(angles)


PLAIN = {
    "mse": plain_mse,
    "debiased": plain_debiased,
    "hybrid": plain_debiased,
    "vmc": plain_vmc,
}


@pytest.mark.parametrize("anchor", [0, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_is_its_definition(loss, anchor):
    guess, target = pair()
    got, wanted = motion_loss(loss, guess, target, anchor), PLAIN[loss](guess, target, anchor)
    assert got.ndim == 0
    torch.testing.assert_close(got, torch.as_tensor(wanted), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_is_as_exact_as_float32_is(loss):
    guess, target = pair(dtype=torch.float32)
    got = motion_loss(loss, guess, target, 1)
    wanted = motion_loss(loss, guess.double(), target.double(), 1)
    assert got.dtype == torch.float32
    assert abs(got - wanted) <= 16 * torch.finfo(torch.float32).eps * wanted


@pytest.mark.parametrize("loss", LOSSES)
def test_is_differentiable(loss):
    guess, target = pair((1, 2, 3, 2, 1))
    guess.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: motion_loss(loss, x, target, 1), guess)


def test_what_all_frames_share_counts_less_without_the_anchor():
    """An error of the same c in every frame: c^2, and ((sqrt(2) - 1) c)^2 beside it."""
    _, target = pair()
    shared = motion_loss("debiased", target + 0.5, target, 2)
    assert shared == pytest.approx(0.25 * (1 + (math.sqrt(2) - 1) ** 2))


def test_frame_differences_keep_their_sign():
    guess, target = pair()
    still = target[:, :, :1].expand_as(target)
    assert motion_loss("vmc", 3 * target + 1, target, 0) == pytest.approx(0)  # direction alone
    assert motion_loss("vmc", -target, target, 0) == pytest.approx(2)  # the reverse is the worst
    assert motion_loss("vmc", still, target, 0) == pytest.approx(1)
    assert motion_loss("vmc", guess, target, 0) == motion_loss("vmc", guess, target, 4)


def test_says_what_is_wrong():
    guess, target = pair()
    with pytest.raises(RequestError, match="loss: must be one of hybrid, debiased, mse, vmc"):
        motion_loss("l1", guess, target, 0)
    with pytest.raises(ShapeError, match=r"got \[2, 3, 5, 4, 2\] and \[2, 3, 4, 4, 2\]"):
        motion_loss("mse", guess, target[:, :, 1:], 0)
    with pytest.raises(ShapeError, match="at least two frames"):
        motion_loss("mse", guess[:, :, :1], target[:, :, :1], 0)


@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_noises_and_aims_as_diffusers_does(timestep):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    clean, noise = pair(dtype=torch.float32)
    at = torch.tensor([timestep] * len(clean))
    made = {
        kind: Diffusion(scheduler.alphas_cumprod, kind)
        for kind in ("epsilon", "v_prediction", "sample")
    }
    velocity = made["v_prediction"]
    noised = scheduler.add_noise(clean, noise, at)
    torch.testing.assert_close(velocity.noise(clean, noise, timestep), noised)
    wanted = scheduler.get_velocity(clean, noise, at)
    torch.testing.assert_close(velocity.target(clean, noise, timestep), wanted)
    assert torch.equal(made["epsilon"].target(clean, noise, timestep), noise)
    assert torch.equal(made["sample"].target(clean, noise, timestep), clean)


@pytest.mark.parametrize("scheduler", SAMPLERS.values())
def test_reads_every_supported_scheduler(scheduler):
    config = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    config |= {"num_train_timesteps": 50, "prediction_type": "v_prediction"}
    if scheduler == "LCMScheduler":
        config |= {"original_inference_steps": 50}
    diffusion = read_diffusion(scheduler, config)
    wanted = (1 - torch.linspace(0.001, 0.02, 50, dtype=torch.float64)).cumprod(0)
    assert (diffusion.timesteps, diffusion.prediction_type) == (50, "v_prediction")
    torch.testing.assert_close(diffusion.alphas_cumprod.double(), wanted, rtol=1e-5, atol=0)


def test_a_scheduler_without_betas_is_refused():
    with pytest.raises(RequestError, match=r"noise schedule: .* must have betas and predict"):
        read_diffusion("FlowMatchEulerDiscreteScheduler", {})
