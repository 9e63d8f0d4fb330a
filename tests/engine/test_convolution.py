import pytest
import torch
from torch import nn

from kinetiq.convolution import CentreTapConvolution, find_centre_taps
from kinetiq.denoiser import EagerDenoiser
from kinetiq.errors import CheckpointError


def centred(**options):
    module = nn.Conv2d(3, 5, **({"kernel_size": 3, "padding": 1} | options))
    with torch.no_grad():
        keep = module.weight[:, :, 1, 1].clone()
        module.weight.zero_()
        module.weight[:, :, 1, 1] = keep
    return module


def count_centred(network):
    """Two kernels of every ResNet block but the ordinary ones."""
    from diffusers.models.resnet import ResnetBlock2D

    from kinetiq.sprites import components

    blocks = [name for name, m in network.named_modules() if isinstance(m, ResnetBlock2D)]
    assert set(components.ORDINARY_BLOCKS) < set(blocks)
    return 2 * (len(blocks) - len(components.ORDINARY_BLOCKS))


@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_the_whole_kernel_does_with_its_parameters(bias):
    torch.manual_seed(0)
    whole = centred(bias=bias).double()
    centre = CentreTapConvolution(whole)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(centre(x), whole(x), rtol=1e-12, atol=1e-12)
    assert centre.weight is whole.weight
    assert centre.bias is whole.bias
    assert centre.state_dict().keys() == whole.state_dict().keys()


def test_finds_those_alone_whose_other_taps_are_zero():
    almost = centred()
    with torch.no_grad():
        almost.weight[4, 2, 0, 2] = 1e-30
    network = nn.ModuleDict(
        {
            "centred": centred(),
            "almost": almost,
            "random": nn.Conv2d(3, 5, 3, padding=1),
            "strided": centred(stride=2),
            "unpadded": centred(padding=0),
            "dilated": centred(dilation=2),
            "reflecting": centred(padding_mode="reflect"),
            "pointwise": nn.Conv2d(3, 5, 1),
        }
    )
    assert list(find_centre_taps(network)) == ["centred"]


def test_the_other_taps_have_no_gradient():
    whole = centred()
    CentreTapConvolution(whole)(torch.randn(1, 3, 4, 4)).square().sum().backward()
    outside = torch.ones(3, 3, dtype=torch.bool)
    outside[1, 1] = False
    assert whole.weight.grad[:, :, 1, 1].any()
    assert not whole.weight.grad[:, :, outside].any()


def test_comes_off_again():
    from kinetiq.sprites import components

    network = components.build_unet().requires_grad_(False)
    stock = dict(network.named_modules())
    count = count_centred(network)
    denoiser = EagerDenoiser(network).attach()
    swapped = [m for m in network.modules() if isinstance(m, CentreTapConvolution)]
    assert len(swapped) == count
    denoiser.detach()
    assert dict(network.named_modules()) == stock


def test_other_weights_are_not_loaded_into_a_centre():
    network = nn.ModuleDict({"inner": CentreTapConvolution(centred())})
    with pytest.raises(CheckpointError, match=r"inner\.weight must be zero but for its centre"):
        network.load_state_dict(nn.ModuleDict({"inner": nn.Conv2d(3, 5, 3)}).state_dict())
    network.load_state_dict(nn.ModuleDict({"inner": centred()}).state_dict())


def test_a_kernel_that_is_trained_keeps_its_taps_unless_asked_not_to():
    from kinetiq.sprites import components

    for keep in (False, True):
        network = components.build_unet()
        count = count_centred(network) if keep else 0
        EagerDenoiser(network, keep_zero_taps=keep).attach()
        found = [m for m in network.modules() if isinstance(m, CentreTapConvolution)]
        assert len(found) == count
