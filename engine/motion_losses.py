"""What a motion is trained to lessen.

With e the network's output and y what it should be, both [rows, channels, frames, h, w]:

    mse       mean (e - y)^2
    debiased  mse + mean (D e - D y)^2,  D x = sqrt(b^2 + 1) x - b x[r],  r one frame of each row
    hybrid    debiased; beside it, low-rank adapters of the spatial layers learn single frames,
              take up what the clip shows, and are thrown away
    vmc       1 - mean over neighbouring frames of cos(e[f + 1] - e[f], y[f + 1] - y[f])

D takes from every frame what one frame, drawn anew at each step, shows, so that what all frames
share counts less and what changes between them more.

Source: `debiased` and `hybrid`: MotionDirector, arXiv:2310.08465, sec. 4.2, with b = 1; `vmc`:
Video Motion Customization, arXiv:2312.00845, sec. 3.2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetiq.errors import RequestError, ShapeError
from kinetiq.sampler import PREDICTION_TYPES

LOSSES = ("hybrid", "debiased", "mse", "vmc")
_ANCHOR_SHARE = 1.0  # b


@dataclass(frozen=True, eq=False)
class Diffusion:
    """The forward process of a checkpoint: how clean latents are noised and what is predicted.

    Args:
        alphas_cumprod: [timesteps], the square of the share of the clean latents at each.
        prediction_type: "epsilon" (the noise), "v_prediction" or "sample" (the clean latents).
    """

    alphas_cumprod: Tensor
    prediction_type: str

    @property
    def timesteps(self) -> int:
        """How many there are."""
        return len(self.alphas_cumprod)

    def noise(self, clean: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Latents noised to a timestep: a z + b n, of shares a and b with a^2 + b^2 = 1."""
        signal, spread = self._shares(clean, timestep)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """What the network should make of the noised latents; v is a n - b z."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        signal, spread = self._shares(clean, timestep)
        return signal * noise - spread * clean

    def _shares(self, like: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        alpha: Tensor = self.alphas_cumprod[timestep].to(like)
        return alpha.sqrt(), (1 - alpha).sqrt()


def read_diffusion(scheduler: str, config: Any) -> Diffusion:
    """The forward process that a checkpoint's scheduler describes.

    Args:
        scheduler: class name of a diffusers scheduler.
        config: what its scheduler_config.json says.

    Raises:
        RequestError: it has no noise schedule of betas, or predicts something else.
    """
    import diffusers

    built = getattr(diffusers, scheduler).from_config(dict(config))
    alphas = getattr(built, "alphas_cumprod", None)
    kind = built.config.get("prediction_type", "epsilon")
    if alphas is None or kind not in PREDICTION_TYPES:
        raise RequestError(
            "noise schedule: the checkpoint's scheduler must have betas and predict "
            f"{', '.join(PREDICTION_TYPES)}, got {scheduler} that predicts {kind!r}"
        )
    return Diffusion(alphas.float(), kind)


def motion_loss(loss: str, guess: Tensor, target: Tensor, anchor: int) -> Tensor:
    """The loss of a clip, a scalar of the type of `guess`.

    Args:
        loss: one of `LOSSES`; `hybrid` is `debiased` here.
        guess: e, [rows, channels, frames, h, w].
        target: y, likewise.
        anchor: r, the frame that `debiased` takes from the others.

    Raises:
        ShapeError: the shapes differ, or there are too few frames.
        RequestError: there is no such loss.
    """
    if guess.shape != target.shape or guess.ndim != 5 or guess.shape[2] < 2:
        raise ShapeError(
            "motion_loss: guess and target must be [rows, channels, frames, h, w] of at least two "
            f"frames, got {list(guess.shape)} and {list(target.shape)}"
        )
    if loss == "mse":
        return mean_squared_error(guess, target)
    if loss in ("debiased", "hybrid"):
        return mean_squared_error(guess, target) + anchored_error(guess, target, anchor)
    if loss == "vmc":
        return difference_angle(guess, target)
    raise RequestError(f"loss: must be one of {', '.join(LOSSES)}, got {loss!r}")


def mean_squared_error(guess: Tensor, target: Tensor) -> Tensor:
    """Mean of (e - y)^2."""
    error: Tensor = guess - target
    return error.square().mean()


def anchored_error(guess: Tensor, target: Tensor, anchor: int) -> Tensor:
    """Mean of (D e - D y)^2; D is linear, so it is applied once, to the difference."""
    error = guess - target
    gain = (_ANCHOR_SHARE**2 + 1) ** 0.5
    left: Tensor = gain * error - _ANCHOR_SHARE * error[:, :, anchor : anchor + 1]
    return left.square().mean()


def difference_angle(guess: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of the differences between neighbouring frames, mean over rows and pairs.

    The differences keep their signs: without them, a motion and its reverse would be the same.
    """
    mine, wanted = (x.diff(dim=2).transpose(1, 2).flatten(2) for x in (guess, target))
    return 1 - torch.cosine_similarity(mine, wanted, dim=-1).mean()
