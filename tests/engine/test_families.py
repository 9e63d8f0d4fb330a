"""Sites of both families: tiny networks in full, real configurations by number and by shape."""

from collections import Counter

import pytest
import tiny
import torch
from torch import nn

import kinetiq as kq
from kinetiq.control_tensors import ControlTensors, DeviationControl, QueryControl, no_injection
from kinetiq.denoiser import EagerDenoiser
from kinetiq.families import (
    ANIMATEDIFF,
    FAMILIES,
    UNET3D,
    Site,
    SiteKind,
    detect_family,
    list_sites,
    select_sites,
    temporal_transformers,
)

TINY = {"animatediff": tiny.tiny_animatediff, "unet3d": tiny.tiny_unet3d}
REAL = {  # class, what differs from its default configuration, width of the prompt
    "AnimateDiff on SD 1.5": ("UNetMotionModel", {"cross_attention_dim": 768}),
    "ZeroScope": ("UNet3DConditionModel", {"cross_attention_dim": 1024, "attention_head_dim": 64}),
}


@pytest.fixture(scope="module", params=TINY)
def network(request):
    return TINY[request.param]()


def build_real(name):
    import diffusers

    class_name, config = REAL[name]
    with torch.device("meta"):
        return getattr(diffusers, class_name)(**config).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=REAL)
def real(request):
    """A full-size network without memory."""
    return request.param, build_real(request.param)


def test_families_are_found_by_their_network():
    assert detect_family(tiny.tiny_animatediff()) is ANIMATEDIFF
    assert detect_family(tiny.tiny_unet3d()) is UNET3D
    assert FAMILIES == {"animatediff": ANIMATEDIFF, "unet3d": UNET3D}


def test_another_network_is_refused():
    message = (
        r"^detect_family: the network must be one of UNetMotionModel \(animatediff\), "
        r"UNet3DConditionModel \(unet3d\), got Linear$"
    )
    with pytest.raises(kq.CheckpointError, match=message):
        detect_family(nn.Linear(1, 1))


def test_every_attention_module_is_a_site_in_the_networks_order(network):
    sites = list_sites(network, detect_family(network))
    modules = [
        name for name, module in network.named_modules() if type(module).__name__ == "Attention"
    ]
    assert [site.name for site in sites] == modules
    for site in sites:
        assert network.get_submodule(site.name).to_q.in_features == site.width


TINY_NAMES = {
    "UNetMotionModel": {
        SiteKind.SPATIAL: "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        SiteKind.CROSS: "mid_block.attentions.0.transformer_blocks.0.attn2",
        SiteKind.TEMPORAL: "up_blocks.1.motion_modules.0.transformer_blocks.0.attn2",
    },
    "UNet3DConditionModel": {
        SiteKind.SPATIAL: "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        SiteKind.CROSS: "mid_block.attentions.0.transformer_blocks.0.attn2",
        SiteKind.TEMPORAL: "up_blocks.1.temp_attentions.0.transformer_blocks.0.attn2",
    },
}


def test_sites_are_named_by_kind_and_place(network):
    sites = list_sites(network, detect_family(network))
    kinds = {site.name: site.kind for site in sites}
    for kind, name in TINY_NAMES[type(network).__name__].items():
        assert kinds[name] is kind
    head = {
        "down": "down_blocks.",
        "mid": "mid_block.",
        "up": "up_blocks.",
        "in": "transformer_in.",
    }
    assert all(site.name.startswith(head[site.place]) for site in sites)
    for transformer in temporal_transformers(network, detect_family(network)):
        inside = [site for site in sites if site.name.startswith(transformer + ".")]
        assert [site.kind for site in inside] == [SiteKind.TEMPORAL] * 2


TINY_COUNTS = {
    "UNetMotionModel": {"spatial": (0, 2, 1, 4), "cross": (0, 2, 1, 4), "temporal": (0, 6, 2, 12)},
    "UNet3DConditionModel": {
        "spatial": (0, 2, 1, 4),
        "cross": (0, 2, 1, 4),
        "temporal": (2, 4, 2, 8),
    },
}
REAL_COUNTS = {
    "AnimateDiff on SD 1.5": {
        "spatial": (0, 6, 1, 9),
        "cross": (0, 6, 1, 9),
        "temporal": (0, 16, 2, 24),  # 21 motion modules of two
    },
    "ZeroScope": {
        "spatial": (0, 6, 1, 9),
        "cross": (0, 6, 1, 9),
        "temporal": (2, 12, 2, 18),  # 16 temporal transformers and the one at the input, of two
    },
}


def count(sites):
    counted = Counter((site.kind.value, site.place) for site in sites)
    return {
        kind: tuple(counted[kind, place] for place in ("in", "down", "mid", "up"))
        for kind in ("spatial", "cross", "temporal")
    }


def test_counts_of_a_tiny_network(network):
    assert count(list_sites(network, detect_family(network))) == TINY_COUNTS[type(network).__name__]


def test_counts_and_widths_of_a_real_network(real):
    name, network = real
    sites = list_sites(network, detect_family(network))
    assert count(sites) == REAL_COUNTS[name]
    spatial = [site for site in sites if site.kind is SiteKind.SPATIAL]
    assert len(spatial) == 16
    assert [site.width for site in spatial] == [
        *(320, 320, 640, 640, 1280, 1280),
        *(1280, 1280, 1280, 640, 640, 640, 320, 320, 320),
        1280,  # the middle block comes last among diffusers' modules
    ]


def all_controls(sites, rows, shape, device):
    """Every kind of control, the last row being the source of the first."""
    row = no_injection(len(sites), rows)
    row[:, 0] = rows - 1
    mask = torch.ones(rows, *shape, device=device)
    blend = torch.ones(len(sites), rows, device=device)
    reduced = torch.zeros(rows, dtype=torch.bool, device=device)
    row = row.to(device)
    return ControlTensors(
        query=QueryControl(row, mask, reduced),
        deviation=DeviationControl(row, blend, torch.ones(rows, 3, device=device), mask),
    )


def test_a_real_network_takes_every_control(real):
    """Shapes alone, on no memory: every site accepts the tensors, at any size of latents."""
    _, network = real
    denoiser = EagerDenoiser(network).attach()
    try:
        shape = (16, 40, 72)
        out = denoiser.predict(
            torch.empty(3, 4, *shape, device="meta"),
            torch.empty(3, device="meta"),
            torch.empty(3, 77, network.config.cross_attention_dim, device="meta"),
            all_controls(denoiser.sites, 3, shape, "meta"),
        )
    finally:
        denoiser.detach()
    assert out.shape == (3, 4, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_network_takes_a_step(name):
    network = build_real(name).to(torch.bfloat16).to_empty(device="cpu")
    tiny.randomise(network)
    rng = torch.Generator().manual_seed(1)
    for buffer in network.buffers():  # the positions, which no state dict holds
        buffer.copy_(torch.randn(buffer.shape, generator=rng))
    denoiser = EagerDenoiser(network).attach()
    spatial = torch.tensor([site.kind is SiteKind.SPATIAL for site in denoiser.sites])
    row = no_injection(len(spatial), 3)
    row[spatial, :2] = 2
    latents = torch.randn(3, 4, 2, 8, 8, generator=rng).bfloat16()
    text = torch.randn(3, 77, network.config.cross_attention_dim, generator=rng).bfloat16()
    given = (latents, torch.full((3,), 500.0), text)
    with torch.inference_mode():
        plain = denoiser.predict(*given)
        injected = denoiser.predict(*given, ControlTensors(query=QueryControl(row, torch.ones(3))))
    assert injected.shape == latents.shape
    assert injected.dtype == torch.bfloat16
    assert injected.isfinite().all()
    assert not torch.equal(injected[:2], plain[:2])
    assert torch.equal(injected[2], plain[2])  # the source keeps its own queries


SITES = tuple(
    Site(f"{block}.{name}", kind, place, 8)
    for block, place in (("down_blocks.1", "down"), ("up_blocks.1", "up"), ("up_blocks.10", "up"))
    for name, kind in (
        ("attn1", SiteKind.SPATIAL),
        ("attn2", SiteKind.CROSS),
        ("motion_modules.attn1", SiteKind.TEMPORAL),
    )
)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("spatial", {0, 3, 6}),
        ("temporal", {2, 5, 8}),
        ("both", {0, 2, 3, 5, 6, 8}),
        ("up_blocks.1", {3, 5}),  # not up_blocks.10, and never cross-attention
        (("up_blocks.1.attn1",), {3}),
        (("down_blocks", "up_blocks.10.motion_modules"), {0, 2, 8}),
    ],
)
def test_sites_are_chosen_by_word_or_name(wanted, chosen):
    assert {index for index, use in enumerate(select_sites(SITES, wanted)) if use} == chosen


@pytest.mark.parametrize("name", ["up_blocks.2", "up_blocks.1.attn2", "up_block", "", "Spatial"])
def test_a_name_that_fits_no_site_is_answered_with_the_nearest(name):
    with pytest.raises(kq.RequestError) as caught:
        select_sites(SITES, ("up_blocks.1", name))
    said, near = str(caught.value).split("such as ")
    assert said == (
        f"sites: must be 'spatial', 'temporal', 'both' or names of sites, got {name!r}; "
        "this network has 6, "
    )
    known = {site.name for site in SITES if site.kind is not SiteKind.CROSS}
    assert len(near.split(", ")) == 3
    assert set(near.split(", ")) <= known
