import torch

from kinetiq.bench import query_cost
from kinetiq.motion_injection import MotionInjection
from kinetiq.query_injection import QueryInjection
from kinetiq.sprites import components


def small_loop(monkeypatch):
    monkeypatch.setitem(components.UNET, "block_out_channels", (16, 32, 32))
    monkeypatch.setitem(components.UNET, "num_attention_heads", (1, 2, 2))
    monkeypatch.setitem(components.UNET, "motion_num_attention_heads", (1, 2, 2))
    monkeypatch.setitem(components.UNET, "norm_num_groups", 8)
    return query_cost.embedded_loop("cpu")


def test_the_rows_are_those_that_the_ratio_promises(monkeypatch):
    loop = small_loop(monkeypatch)
    seen = []
    predict = loop.denoiser.predict

    def spy(latents, *rest):
        seen.append(len(latents))
        return predict(latents, *rest)

    loop.denoiser.predict = spy
    expected = {
        "plain": (None, 1, [2] * 5),
        "one": (QueryInjection(loop.reference, until=0.4), 1, [3, 3, 2, 2, 2]),
        "four": (QueryInjection(loop.reference, until=0.4), 4, [9, 9, 8, 8, 8]),
        "motion": (MotionInjection(loop.reference), 4, [9] * 5),
    }
    for control, clips, rows in expected.values():
        seen.clear()
        loop.run(control, clips)
        assert seen == rows
    seen.clear()
    loop.run_recorded()
    assert seen == [1, 1, 2, 2, 2, 2, 2]


def test_the_recorded_way_injects_what_it_recorded(monkeypatch):
    """Queries are kept in the first pass and stand in for both rows' own in the second."""
    loop = small_loop(monkeypatch)
    recorded, injected = {}, []

    def keep(seen, name, module, given, output):
        kept(seen, name, module, given, output)
        recorded.setdefault(name, []).append(output)

    def inject(queries, module, given, output):
        out = put(queries, module, given, output)
        injected.append((queries, out))
        return out

    kept, put = query_cost._keep, query_cost._inject
    monkeypatch.setattr(query_cost, "_keep", keep)
    monkeypatch.setattr(query_cost, "_inject", inject)
    loop.run_recorded()
    spatial = [s.name for s in loop.denoiser.sites if s.kind == "spatial"]
    assert {name: len(seen) for name, seen in recorded.items()} == dict.fromkeys(spatial, 2)
    assert len(injected) == 2 * len(spatial)
    for queries, out in injected:
        assert torch.equal(out, queries.repeat(2, 1, 1, 1))
        assert any(torch.equal(queries, one) for seen in recorded.values() for one in seen)
    for name in spatial:
        assert not loop.denoiser.network.get_submodule(f"{name}.to_q")._forward_hooks


def test_full_size_memory_counts_the_weights_of_animatediff():
    network = query_cost._full_size_network("meta")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 1.30e9 < parameters < 1.33e9
