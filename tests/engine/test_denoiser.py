"""The network with our attention in it equals the stock one, and can be had back."""

import copy

import pytest
import tiny
import torch
from closeness import assert_as_good_as
from stock import predict_stock
from torch import nn

import kinetiq as kq
from kinetiq.attention import (
    CrossProcessor,
    Signal,
    SpatialProcessor,
    TemporalTransformer,
    _fuses,
)
from kinetiq.control_tensors import (
    ControlTensors,
    DeviationControl,
    LoraBank,
    LoraControl,
    MotionBank,
    MotionControl,
    QueryControl,
    SharedKeyControl,
    no_injection,
)
from kinetiq.denoiser import EagerDenoiser
from kinetiq.errors import RequestError
from kinetiq.families import SiteKind
from kinetiq.kernels import temporal_block

TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32


def sample(rows=2, frames=3, height=8, width=8):
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, 4, frames, height, width, generator=rng)
    text = torch.randn(rows, 5, tiny.CROSS_WIDTH, generator=rng)
    return latents, 999 * torch.rand(rows, generator=rng), text


def assert_equal(got, wanted):
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((2, 3, 8, 8), id="square"),
        pytest.param((1, 1, 4, 12), id="one row of one frame"),
        pytest.param((3, 2, 7, 5), id="odd, so that levels round up"),
        pytest.param((1, 32, 4, 4), id="all positions of the motion modules"),
    ],
)
def test_equals_the_stock_network(networks, family, size):
    network, given = networks[family], sample(*size)
    wanted = predict_stock(network, family, *given)
    denoiser = EagerDenoiser(network).attach()
    got = denoiser.predict(*given)
    denoiser.detach()
    assert_equal(got, wanted)


def test_equals_the_stock_network_where_temporal_layers_are_one_kernel(
    networks, family, monkeypatch
):
    shapes = []

    def wins(*shape):
        shapes.append(shape)
        return True

    monkeypatch.setattr("kinetiq.attention.wins", wins)
    monkeypatch.setattr(TemporalTransformer, "_attend", None)  # must not be needed
    network, given = networks[family], sample()
    wanted = predict_stock(network, family, *given)
    denoiser = EagerDenoiser(network).attach()
    with torch.no_grad():
        got = denoiser.predict(*given)
    denoiser.detach()
    assert_equal(got, wanted)
    temporal = [site for site in denoiser.sites if site.kind is SiteKind.TEMPORAL]
    assert len(shapes) == len(temporal)
    assert {shape[:2] for shape in shapes} == {(2, 3)}  # rows and frames


def test_a_steered_layer_is_never_the_one_kernel_that_cannot_be_steered(networks, monkeypatch):
    monkeypatch.setattr("kinetiq.attention.wins", lambda *_: True)
    monkeypatch.setattr("kinetiq.attention.temporal_block", None)  # must not be called
    denoiser = EagerDenoiser(networks["animatediff"]).attach()
    try:
        sites = len(denoiser.sites)
        row = no_injection(sites, 2)
        row[:, 0] = 1
        moved = DeviationControl(row, torch.ones(sites, 2), torch.ones(2, 3))
        with torch.no_grad():
            denoiser.predict(*sample(), ControlTensors(deviation=moved))
    finally:
        denoiser.detach()


class Adapted(nn.Linear):
    """A projection that is more than its weights, as with a LoRA around it."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


def adapted(linear):
    made = Adapted(linear.in_features, linear.out_features, linear.bias is not None)
    made.load_state_dict(linear.state_dict())
    return made


def listen(linear):
    linear.register_forward_hook(lambda *_: None)
    return linear


def without_bias(linear):
    return nn.Linear(linear.in_features, linear.out_features, bias=False)


def with_bias(linear):
    return nn.Linear(linear.in_features, linear.out_features)


@pytest.mark.parametrize(
    ("owner", "name", "change"),
    [
        *(("attn1", name, adapted) for name in ("to_q", "to_k", "to_v")),
        ("attn1.to_out", "0", adapted),
        ("attn1", "to_v", listen),
        *(("attn1", name, with_bias) for name in ("to_q", "to_k", "to_v")),
        ("attn1.to_out", "0", without_bias),
        ("attn1.to_out", "1", lambda _: nn.Dropout(0.5).train()),
        ("attn1.to_out", "1", lambda _: nn.Identity()),
        ("norm1", "weight", lambda _: None),
        ("norm1", "bias", lambda _: None),
        ("", "norm1", lambda norm: nn.RMSNorm(norm.normalized_shape)),
        ("attn1", "rescale_output_factor", lambda _: 2.0),
    ],
)
def test_one_kernel_takes_a_layer_only_if_it_computes_it(
    networks, owner, name, change, monkeypatch
):
    monkeypatch.setattr("kinetiq.attention.wins", lambda *_: True)
    denoiser = EagerDenoiser(networks["animatediff"])
    site = next(site for site in denoiser.sites if site.kind is SiteKind.TEMPORAL)
    block = copy.deepcopy(denoiser.network.get_submodule(site.name.rpartition(".")[0]))
    tokens = torch.zeros(1, 2, 3, block.attn1.to_q.in_features)
    fuses = lambda: _fuses(block.norm1, block.attn1, tokens)
    with torch.no_grad():
        assert fuses()
        block.attn1.to_out[1] = nn.Dropout(0.5).eval()
        assert fuses()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # its types are not those of the weights
            assert not fuses()
        with torch.enable_grad():
            assert not fuses()
        changed = block.get_submodule(owner)
        setattr(changed, name, change(getattr(changed, name)))
        assert not fuses()


def test_an_adapted_layer_is_computed_where_others_are_one_kernel(networks, family, monkeypatch):
    monkeypatch.setattr("kinetiq.attention.wins", lambda *_: True)
    network, given = copy.deepcopy(networks[family]), sample()
    site = next(site for site in EagerDenoiser(network).sites if site.kind is SiteKind.TEMPORAL)
    attention = network.get_submodule(site.name)
    attention.to_v = adapted(attention.to_v)
    with torch.no_grad():
        wanted = predict_stock(network, family, *given)
        assert_equal(EagerDenoiser(network).attach().predict(*given), wanted)


def embedding(denoiser, rows=2, frames=3):
    """Another motion in each row, for all temporal sites but the last."""
    rng = torch.Generator().manual_seed(1)
    temporal = [n for n, site in enumerate(denoiser.sites) if site.kind is SiteKind.TEMPORAL]
    draw = lambda n: torch.randn(rows + 1, frames, denoiser.sites[n].width, generator=rng)
    banks = {n: MotionBank(projected_query=draw(n), projected_key=draw(n)) for n in temporal[:-1]}
    return MotionControl(torch.arange(1, rows + 1), torch.ones(rows), banks)


def lora_of(path, width):
    bank = LoraBank(torch.ones(2, 1, width), torch.ones(2, width, 1))
    return LoraControl(torch.tensor([1, 0]), torch.ones(2), {path: bank})


def test_controls_that_do_not_act_in_a_temporal_layer_leave_it_to_one_kernel(
    networks, family, monkeypatch
):
    denoiser, given, called = EagerDenoiser(networks[family]).attach(), sample(), []
    temporal = [site for site in denoiser.sites if site.kind is SiteKind.TEMPORAL]
    first = temporal[0]

    def count(*tensors, **options):
        called.append(options.get("motion_slot") is not None)
        return temporal_block(*tensors, **options)

    monkeypatch.setattr("kinetiq.attention.temporal_block", count)
    queries = masked_controls(denoiser.sites, 2, None)
    rows = torch.arange(2)
    shared = SharedKeyControl(rows, rows[:0], 1 - rows[:, None], torch.ones(2, 3, 8, 8))
    cases = [  # controls, layers in one kernel, those of them that add a motion
        (ControlTensors(shared_key=shared), len(temporal), 0),
        (ControlTensors(motion=embedding(denoiser)), len(temporal), len(temporal) - 1),
        (ControlTensors(lora=lora_of(f"{first.name}.to_q", first.width)), len(temporal) - 1, 0),
        (ControlTensors(lora=lora_of(f"{first.name}.to_out.0", first.width)), len(temporal) - 1, 0),
        (ControlTensors(query=queries.query), 0, 0),
        (ControlTensors(deviation=queries.deviation), 0, 0),
    ]
    try:
        with torch.no_grad():
            for controls, fused, moved in cases:
                monkeypatch.setattr("kinetiq.attention.wins", lambda *_: False)
                wanted = denoiser.predict(*given, controls)
                monkeypatch.setattr("kinetiq.attention.wins", lambda *_: True)
                called.clear()
                assert_equal(denoiser.predict(*given, controls), wanted)
                assert (len(called), sum(called)) == (fused, moved)
    finally:
        denoiser.detach()


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "one kernel"])
def test_a_temporal_transformer_compiles_whole(networks, family, fused, monkeypatch):
    denoiser = EagerDenoiser(networks[family]).attach()
    module = next(m for m in denoiser.network.modules() if isinstance(m, TemporalTransformer))
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, module.norm.num_channels, 2, 2, generator=rng)
    monkeypatch.setattr("kinetiq.attention.wins", lambda *_: fused)  # False on any CPU
    called = set()

    def backend(graph, _):
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph

    try:
        with torch.no_grad():
            wanted = module(hidden, num_frames=3)
            got = torch.compile(module, fullgraph=True, backend=backend)(hidden, num_frames=3)
    finally:
        denoiser.detach()
    torch.testing.assert_close(got, wanted)
    operators = {"temporal_block", "frame_attention"}
    found = {one for one in operators if any(one in target for target in called)}
    assert found == {"temporal_block" if fused else "frame_attention"}


def test_in_bfloat16_errs_at_most_twice_as_much_as_stock(networks, family):
    given = sample()
    exact = predict_stock(networks[family], family, *given).double()
    network = copy.deepcopy(networks[family]).bfloat16()
    latents, timesteps, text = given
    small = (latents.bfloat16(), timesteps, text.bfloat16())
    naive = predict_stock(network, family, *small)
    got = EagerDenoiser(network).attach().predict(*small)
    assert got.dtype == torch.bfloat16
    assert_as_good_as(got, naive, exact)


def test_each_row_has_its_own_timestep(denoiser):
    latents, _, text = sample(rows=3)
    timesteps = torch.tensor([10.0, 500.0, 990.0])
    together = denoiser.predict(latents, timesteps, text)
    for row in range(3):
        one = slice(row, row + 1)
        assert_equal(together[one], denoiser.predict(latents[one], timesteps[one], text[one]))
    same = denoiser.predict(latents, timesteps[:1].expand(3), text)
    assert (same[1:] - together[1:]).abs().max() > 0.05  # time matters


def snapshot(network):
    modules = {name: id(module) for name, module in network.named_modules()}
    return modules, {name: id(processor) for name, processor in network.attn_processors.items()}


def test_detaching_gives_the_very_modules_back(networks, family):
    network, given = networks[family], sample()
    before, wanted = snapshot(network), predict_stock(network, family, *given)
    denoiser = EagerDenoiser(network)
    assert not denoiser.attached
    for _ in range(2):
        assert denoiser.attach() is denoiser
        assert denoiser.attached
        attached = snapshot(network)
        assert denoiser.attach() is denoiser  # attaching twice is attaching once
        assert snapshot(network) == attached
        assert denoiser.detach() is network
        assert denoiser.detach() is network
        assert not denoiser.attached
        assert snapshot(network) == before
    assert torch.equal(predict_stock(network, family, *given), wanted)


def test_every_site_is_ours_while_attached(denoiser):
    network = denoiser.network
    ours = {SiteKind.SPATIAL: SpatialProcessor, SiteKind.CROSS: CrossProcessor}
    for site in denoiser.sites:
        if site.kind is SiteKind.TEMPORAL:
            owner = network.get_submodule(site.name.partition(".transformer_blocks")[0])
            assert isinstance(owner, TemporalTransformer)
        else:
            assert isinstance(network.get_submodule(site.name).processor, ours[site.kind])


def test_parameters_are_shared_and_keep_their_names(networks, family):
    network = networks[family]
    before = {name: value.data_ptr() for name, value in network.state_dict().items()}
    parameters = {name: id(value) for name, value in network.named_parameters()}
    denoiser = EagerDenoiser(network).attach()
    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == before
    assert {name: id(value) for name, value in network.named_parameters()} == parameters
    denoiser.detach()


def test_gradients_reach_every_parameter_that_stock_reaches(networks, family):
    network = copy.deepcopy(networks[family]).requires_grad_(True)
    given = sample(rows=1, frames=2, height=4, width=4)

    def gradients(out):
        network.zero_grad()
        out.square().sum().backward()
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    wanted = gradients(predict_stock(network, family, *given))
    got = gradients(EagerDenoiser(network).attach().predict(*given))
    assert got.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in got.items():
        assert (gradient - wanted[name]).abs().max() <= TOLERANCE * largest, name


def masked_controls(sites, rows, mask):
    row = no_injection(len(sites), rows)
    row[:, 0] = rows - 1
    blend = torch.ones(len(sites), rows)
    return ControlTensors(
        QueryControl(row, torch.ones(rows) if mask is None else mask),
        DeviationControl(row, blend, torch.ones(rows, 3), mask),
    )


def test_a_region_fits_every_site_of_an_odd_size(denoiser):
    given = sample(height=7, width=5)
    mask = torch.ones(2, 3, 7, 5)
    whole = denoiser.predict(*given, masked_controls(denoiser.sites, 2, None))
    assert_equal(denoiser.predict(*given, masked_controls(denoiser.sites, 2, mask)), whole)
    plain = denoiser.predict(*given)
    assert_equal(denoiser.predict(*given, masked_controls(denoiser.sites, 2, 0 * mask)), plain)
    assert (whole - plain)[0].abs().max() > 0.05 * plain.abs().max()
    assert_equal(whole[1], plain[1])  # the row that is read stays what it was


def test_a_prediction_that_fails_leaves_no_control_behind(denoiser):
    latents, timesteps, text = sample()
    plain = denoiser.predict(latents, timesteps, text)
    controls = masked_controls(denoiser.sites, 2, None)
    with pytest.raises(RuntimeError):
        denoiser.predict(latents, timesteps, text[..., :-1], controls)
    assert torch.equal(predict_attached(denoiser, latents, timesteps, text), plain)


def predict_attached(denoiser, latents, timesteps, text):
    """Calls the network itself, which then reads the controls that `predict` left behind."""
    return denoiser.network(latents, timesteps, text).sample


def test_watching_that_cannot_start_or_fails_leaves_nothing_behind(denoiser):
    rows, words = torch.tensor([0]), torch.ones(1, 5) / 5
    with pytest.raises(RequestError, match="tap: must be a block"):
        denoiser.watching(rows, words, "up_blocks.9").__enter__()
    assert denoiser.signal.word_capture is None
    with pytest.raises(ValueError, match="mine"), denoiser.watching(rows, words, "up_blocks.1"):
        raise ValueError("mine")
    assert denoiser.signal.word_capture is None  # and no hook, which the fixture looks for


@pytest.mark.parametrize(("words", "tap"), [(5, ""), (0, "up_blocks.1"), (5, "up_blocks.1")])
def test_only_what_is_watched_is_kept(denoiser, words, tap):
    given = sample()
    with denoiser.watching(torch.tensor([1]), torch.ones(1, words) / 5, tap) as watched:
        denoiser.predict(*given)
    assert bool(watched.words) is bool(words)
    assert (watched.features is not None) is bool(tap)
    cross = {n for n, site in enumerate(denoiser.sites) if site.kind is SiteKind.CROSS}
    assert set(watched.words) == (cross if words else set())


def test_another_network_is_refused():
    with pytest.raises(kq.CheckpointError, match=r"got Linear$"):
        EagerDenoiser(nn.Linear(1, 1))


@pytest.mark.parametrize("kind", SiteKind)
@pytest.mark.parametrize(
    ("feature", "value", "message"),
    [
        ("norm_q", nn.Identity(), "norm_q"),
        ("group_norm", nn.Identity(), "group_norm"),
        ("spatial_norm", nn.Identity(), "spatial_norm"),
        ("residual_connection", True, "a residual connection"),
    ],
)
def test_what_no_supported_network_uses_is_refused(denoiser, kind, feature, value, message):
    site = next(site for site in denoiser.sites if site.kind is kind)
    module = denoiser.network.get_submodule(site.name)
    stock = getattr(module, feature)
    setattr(module, feature, value)
    try:
        with pytest.raises(
            kq.CheckpointError,
            match=rf"^attention: the network must use plain attention modules, got {message}$",
        ):
            denoiser.predict(*sample())
    finally:
        setattr(module, feature, stock)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(1)}, "plain attention modules, got an attention mask"),
        ({"ip_adapter_masks": 1, "scale": 2}, "got options ip_adapter_masks, scale"),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda: SpatialProcessor(0, Signal()), lambda: CrossProcessor(0, Signal())]
)
def test_what_a_processor_does_not_do_is_refused(networks, make, options, message):
    network = networks["animatediff"]
    module = network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    with pytest.raises(kq.CheckpointError, match=message):
        make()(module, torch.zeros(1, 4, 32), **options)


def test_cross_attention_without_a_prompt_is_refused(networks):
    module = networks["animatediff"].get_submodule(
        "mid_block.attentions.0.transformer_blocks.0.attn2"
    )
    with pytest.raises(kq.CheckpointError, match=r"^cross-attention: .* a prompt, got none$"):
        CrossProcessor(0, Signal())(module, torch.zeros(1, 4, 32))
