"""DDIM inversion against closed forms and diffusers' own, and how noises are joined."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_scheduler

import kinetiq as kq
from kinetiq.inversion import blend_noise, invert, resize_noise, resolve_noise
from kinetiq.text import encode_prompts

TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32
SHAPE = (4, 4, 8, 8)


@pytest.fixture(params=["animatediff", "unet3d"])
def engine(tiny_folder, request):
    with kq.Engine.load(tiny_folder(request.param)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def checkpoint(tiny_folder):
    with kq.Engine.load(tiny_folder()) as loaded:
        yield loaded.checkpoint


def parts(checkpoint, **scheduler):
    return SimpleNamespace(
        tokenizer=checkpoint.tokenizer,
        text_encoder=checkpoint.text_encoder,
        dtype=torch.float32,
        scheduler_config=dict(tiny_scheduler("DDIMScheduler", **scheduler).config),
    )


def assert_equal(got, wanted):
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


class Network:
    """A denoiser whose output is `change(sample, timestep)`."""

    def __init__(self, change):
        self.change = change
        self.seen = []

    def predict(self, latents, timesteps, text, controls):  # noqa: ARG002  the protocol
        self.seen.append(timesteps.item())
        return self.change(latents, timesteps.item())


def noise_like(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample_back(scheduler, predict, noise, steps):
    """What diffusers makes of a noise without guidance."""
    scheduler.set_timesteps(steps)
    sample = noise
    for t in scheduler.timesteps:
        sample = scheduler.step(predict(sample, t), t, sample).prev_sample
    return sample


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "sample", "set_alpha_to_one": False},
        {"prediction_type": "epsilon", "beta_schedule": "scaled_linear", "steps_offset": 0},
        {"prediction_type": "epsilon", "timestep_spacing": "trailing"},
    ],
)
def test_is_exact_where_the_output_does_not_depend_on_the_sample(checkpoint, settings):
    constant, clean = 0.3 * noise_like(seed=1), noise_like(seed=2)
    network = Network(lambda *_: constant[None])
    noise = invert(parts(checkpoint, **settings), network, clean, steps=20)
    assert network.seen == sorted(network.seen) and len(network.seen) == 20
    scheduler = tiny_scheduler("DDIMScheduler", **settings)
    again = sample_back(scheduler, lambda *_: constant, noise, 20)
    assert_equal(again, clean)
    assert (noise - clean).abs().max() > 0.1 * clean.abs().max()


def test_a_linear_network_gives_the_closed_form(checkpoint):
    """eps = L x: with A = a / a' and B = b - A b' of each step back, x = (A + B L) x'."""
    slope, steps = 0.4, 10
    clean = noise_like()
    noise = invert(parts(checkpoint), Network(lambda x, _: slope * x), clean, steps=steps)
    scheduler = tiny_scheduler("DDIMScheduler")
    scheduler.set_timesteps(steps)
    share = scheduler.alphas_cumprod.double()
    factor = 1.0
    for t in scheduler.timesteps:
        now, after = share[t], share[t - 100] if t >= 100 else torch.tensor(1.0)
        kept = (now / after).sqrt()
        factor *= kept + ((1 - now).sqrt() - kept * (1 - after).sqrt()) * slope
    wanted = float(factor) * clean
    assert_equal(noise, wanted)


def test_equals_the_inverse_scheduler_of_diffusers(engine):
    from diffusers import DDIMInverseScheduler

    text = encode_prompts(engine.checkpoint, ["a ring"])
    scheduler = DDIMInverseScheduler.from_config(dict(engine.checkpoint.scheduler_config))
    scheduler.set_timesteps(10)
    sample = clean = noise_like()
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = engine.denoiser.predict(sample[None], torch.tensor([float(t)]), text)[0]
            sample = scheduler.step(out, t, sample).prev_sample
    noise = invert(engine.checkpoint, engine.denoiser, clean, steps=10, prompt="a ring")
    assert_equal(noise, sample)
    assert not noise.is_inference() and not noise.requires_grad  # training may use it
    other = invert(engine.checkpoint, engine.denoiser, clean, steps=10)
    assert not torch.equal(other, noise)  # the prompt counts


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_from_the_noise_gives_the_clip_back_the_closer_the_more_steps(
    checkpoint, prediction
):
    """With the ideal network for clips of normally distributed values of deviation `spread`.

    The output is taken one step beside its place, an error of first order in the step.
    """
    spread = 0.5
    scheduler = tiny_scheduler("DDIMScheduler", prediction_type=prediction)

    def ideal(sample, t):
        share = scheduler.alphas_cumprod[int(t)]
        signal, noise = share.sqrt(), (1 - share).sqrt()
        clean = signal * spread**2 * sample / (share * spread**2 + 1 - share)
        predicted = (sample - signal * clean) / noise
        return predicted if prediction == "epsilon" else signal * predicted - noise * clean

    clean = spread * noise_like()
    errors = []
    for steps in (25, 50, 100):
        given = parts(checkpoint, prediction_type=prediction)
        inverted = invert(given, Network(ideal), clean, steps=steps)
        again = sample_back(scheduler, ideal, inverted, steps)
        errors.append(float((again - clean).abs().max() / clean.abs().max()))
        assert abs(float(inverted.std() / noise_like().std()) - 1.0) <= 5 / steps
    assert errors[1] <= 0.06
    assert errors[1] <= 0.6 * errors[0] and errors[2] <= 0.6 * errors[1]
    refined = invert(given, Network(ideal), clean, steps=100, refinements=1)
    again = sample_back(scheduler, ideal, refined, 100)
    assert float((again - clean).abs().max() / clean.abs().max()) <= 0.2 * errors[2]


def test_a_network_that_predicts_the_clip_is_inverted_where_a_step_keeps_no_noise(checkpoint):
    """A last step to the clip itself is x' = m; its noise is what m leaves of x'."""
    settings = {"prediction_type": "sample", "timestep_spacing": "trailing"}
    clean = noise_like()
    noise = invert(parts(checkpoint, **settings), Network(lambda x, _: 0.5 * x), clean, steps=1)
    signal = tiny_scheduler("DDIMScheduler").alphas_cumprod[999].sqrt()
    assert_equal(noise, (1 + 0.5 * signal) * clean)


def test_what_does_not_stay_finite_is_named_with_its_step(checkpoint):
    def change(x, _):
        return x if len(network.seen) < 3 else torch.full_like(x, torch.nan)

    network = Network(change)
    with pytest.raises(kq.NonFiniteError, match=r"invert: .* got NaN or infinity at step 3 of 5"):
        invert(parts(checkpoint), network, noise_like(), steps=5)


def test_what_overflows_in_half_precision_is_inverted_in_float32_and_that_is_said(
    tiny_folder, monkeypatch
):
    clean, dtype = noise_like(), torch.bfloat16
    with kq.Engine.load(tiny_folder()) as wide:
        wanted = invert(wide.checkpoint, wide.denoiser, clean, steps=3)
    with kq.Engine.load(tiny_folder(), dtype=dtype) as engine:
        network, predict = engine.checkpoint.unet, engine.denoiser.predict
        narrow = [wide_to(tensor, dtype) for tensor in wide.checkpoint.unet.parameters()]
        before = [(t.dtype, t.data_ptr(), t.clone()) for t in tensors_of(network)]

        def overflowing(latents, *given):
            out = predict(latents, *given)
            return out if latents.dtype == torch.float32 else torch.full_like(out, torch.inf)

        monkeypatch.setattr(engine.denoiser, "predict", overflowing)
        message = r"infinity at step 1 of 3 in bfloat16; .*; it is inverted once more in float32"
        with pytest.warns(kq.KinetiqWarning, match=message):
            found = invert(engine.checkpoint, engine.denoiser, clean, steps=3)
        for tensor, (kind, place, value) in zip(tensors_of(network), before, strict=True):
            assert (tensor.dtype, tensor.data_ptr()) == (kind, place)
            assert torch.equal(tensor, value)
    # The weights are those of `dtype`, so it errs as far as rounding them does, and no further.
    rounding = max(float((t - w).abs().max() / w.abs().max()) for t, w in narrow)
    assert rounding < 2**-7
    assert (found - wanted).abs().max() <= 64 * rounding * wanted.abs().max()


def test_what_overflows_in_float32_too_is_an_error_and_leaves_the_network(tiny_folder, monkeypatch):
    with kq.Engine.load(tiny_folder(), dtype=torch.bfloat16) as engine:
        before = {tensor.dtype for tensor in tensors_of(engine.checkpoint.unet)}
        monkeypatch.setattr(
            engine.denoiser, "predict", lambda latents, *_: torch.full_like(latents, torch.nan)
        )
        with (
            pytest.warns(kq.KinetiqWarning, match="in bfloat16"),
            pytest.raises(kq.NonFiniteError, match=r"at step 1 of 2 in float32$"),
        ):
            invert(engine.checkpoint, engine.denoiser, noise_like(), steps=2)
        assert {tensor.dtype for tensor in tensors_of(engine.checkpoint.unet)} == before


def tensors_of(network):
    return [*network.parameters(), *network.buffers()]


def wide_to(tensor, dtype):
    return tensor.detach().to(dtype).float(), tensor.detach()


def test_samples_are_float32_whatever_the_network_computes_in(checkpoint):
    given = parts(checkpoint)
    given.dtype = torch.bfloat16
    seen = []

    def change(x, _):
        seen.append(x.dtype)
        return torch.zeros_like(x)

    said = []
    clean = noise_like().double()
    noise = invert(
        given, Network(change), clean, steps=3, progress=lambda *words: said.append(words)
    )
    assert seen == [torch.bfloat16] * 3 and noise.dtype == torch.float32
    assert said == [("inverting", 1, 3), ("inverting", 2, 3), ("inverting", 3, 3)]


def test_a_refinement_takes_the_output_at_what_was_found(checkpoint):
    """eps = L x and one refinement: x = (x' - B L x1) / A with x1 = (x' - B L x') / A."""
    slope, clean = 0.4, noise_like()
    plain = invert(parts(checkpoint), Network(lambda x, _: slope * x), clean, steps=1)
    network = Network(lambda x, _: slope * x)
    refined = invert(parts(checkpoint), network, clean, steps=1, refinements=1)
    assert len(network.seen) == 2
    share = tiny_scheduler("DDIMScheduler").alphas_cumprod[1].double()  # steps_offset is 1
    first = share.sqrt() + slope * (1 - share).sqrt()
    assert_equal(plain, first * clean)
    assert_equal(refined, (share.sqrt() + slope * first * (1 - share).sqrt()) * clean)
    with pytest.raises(kq.RequestError, match="refinements must be at least 0, got -1"):
        invert(parts(checkpoint), network, clean, refinements=-1)


def test_latents_of_another_rank_are_refused(checkpoint):
    with pytest.raises(kq.ShapeError, match=r"must be \[channels, frames, h, w\], got \[1, 4, 4"):
        invert(parts(checkpoint), Network(lambda x, _: x), noise_like()[None])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_a_blend_has_unit_variance(share):
    fresh, inverted = noise_like((4, 16, 32, 32)), noise_like((4, 16, 32, 32), 1)
    blend = blend_noise(fresh, inverted, share)
    # The variance of n values of unit variance has deviation sqrt(2 / n); five of them.
    assert abs(float(blend.var()) - 1.0) <= 5 * math.sqrt(2 / blend.numel())
    cosine = float((blend * inverted).mean() / (blend.std() * inverted.std()))
    assert abs(cosine - math.sqrt(share)) <= 5 / math.sqrt(blend.numel())


def test_a_blends_ends_are_its_parts():
    fresh, inverted = noise_like(), noise_like(seed=1)
    assert torch.equal(blend_noise(fresh, inverted, 0.0), fresh)
    assert torch.equal(blend_noise(fresh, inverted, 1.0), inverted)


@pytest.mark.parametrize("size", [(4, 8, 8), (6, 16, 12), (3, 5, 4)])
def test_resized_noise_has_unit_variance_and_stays_itself(size):
    noise = 0.7 * noise_like()
    resized = resize_noise(noise, size)
    assert resized.shape == (4, *size)
    assert abs(float(resized.std(correction=0)) - 1.0) <= 1e-5
    smooth = torch.nn.functional.interpolate(noise[None], size=size, mode="trilinear")[0]
    cosine = torch.nn.functional.cosine_similarity(resized.flatten(), smooth.flatten(), dim=0)
    assert cosine >= 1 - 1e-5


def test_noise_that_is_not_wanted_is_none():
    assert resolve_noise(None, 0.5, (4, 8, 8)) is None
    assert resolve_noise(noise_like(), 0.0, (4, 8, 8)) is None
    found = resolve_noise(noise_like(), 0.5, (4, 8, 8))
    assert found.share == 0.5 and found.noise.shape == SHAPE


def test_says_what_is_wrong():
    with pytest.raises(kq.ShapeError, match=r"the same shape, got \[4, 4, 8, 8\] and \[4, 2, 8, 8"):
        blend_noise(noise_like(), noise_like()[:, :2], 0.5)
    with pytest.raises(kq.RequestError, match=r"share must be from 0 to 1, got 1\.5"):
        blend_noise(noise_like(), noise_like(), 1.5)
    with pytest.raises(kq.RequestError, match="noise: must vary"):
        resize_noise(torch.ones(SHAPE), (4, 8, 8))
