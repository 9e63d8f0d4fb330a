"""The network as one graph with every control as an input.

While a network is exported, its attention sites, temporal transformers and skip connections are
those of this file. They compute what `kinetiq.attention` and `kinetiq.skips` do, but call the
nodes of `kinetiq.export.nodes`, one for each thing that a control may change, and read controls
from the graph's inputs. So a kind of control is taken out of a finished file by replacing nodes;
see `kinetiq.export.specialisation`.

A motion embedding is added before the projections here, not behind them as W m, since a LoRA of
the same graph may change W from row to row.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn

from kinetiq.convolution import find_centre_taps
from kinetiq.errors import CheckpointError
from kinetiq.export.metadata import TensorInfo
from kinetiq.export.nodes import KINDS, NODES, find_node
from kinetiq.families import Site, SiteKind, detect_family, list_sites, temporal_transformers
from kinetiq.skips import Skip, list_skips
from kinetiq.taps import Tap

_PROJECTIONS = ("to_q", "to_k", "to_v")


@dataclass
class _Given:
    """What the forward pass under way was given; written by `NetworkGraph` alone."""

    rows: int = 1
    frames: int = 1
    text: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    before_temporal: dict[str, Tensor] = field(default_factory=dict)


class NetworkGraph(nn.Module):
    """A diffusers network as a function of tensors alone.

    In a `with` block its sites are those of this file; behind it the network is what it was.

    Args:
        network: of a supported family, with its stock modules.
        controls: the kinds of control that are inputs.
        tap: a block whose features are returned too, or None.
    """

    def __init__(self, network: Any, controls: Collection[str], tap: Tap | None = None) -> None:
        super().__init__()
        self.network = network
        self.family = detect_family(network)
        self.sites = list_sites(network, self.family)
        self.skips = list_skips(network, self.family)
        self.levels = len(network.config.block_out_channels)
        self.controls = frozenset(controls)
        self.tap = tap
        self._given = _Given()
        self._features: list[Tensor] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            for name, module in find_centre_taps(self.network).items():
                self._replace(undo, name, _pointwise(module))
            for name in temporal_transformers(self.network, self.family):
                own = {site.name: number for number, site in enumerate(self.sites)}
                module = self.network.get_submodule(name)
                self._replace(undo, name, _Transformer(module, name, own, self))
            for number, site in enumerate(self.sites):
                if site.kind is not SiteKind.TEMPORAL:
                    self._process(undo, number, site)
            if "skip" in self.controls:
                self._hook_skips(undo)
            if self.tap is not None:
                block = self.network.get_submodule(self.tap.name)
                undo.callback(block.register_forward_hook(self._keep_features).remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, controls: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the prediction; with a tap also its features and what moves in them.

        Args:
            latents: [rows, channels, frames, h, w].
            timesteps: [rows], float32.
            text: [rows, tokens, width].
            controls: by the names of `list_inputs`.
        """
        given = self._given
        given.rows, _, given.frames = latents.shape[:3]
        given.text, given.inputs, given.before_temporal = text, controls, {}
        self._features.clear()
        prediction: Tensor = self.network(latents, timesteps, text, return_dict=False)[0]
        if self.tap is None:
            return (prediction,)
        seen = self._features.pop()
        features = seen.view(given.rows, given.frames, *seen.shape[1:]).movedim(2, -1)
        features = features.contiguous()
        motion = NODES["motion_feature"].call(features.flatten(2, 3), controls["feature_channels"])
        return prediction, features, motion

    def _replace(self, undo: contextlib.ExitStack, name: str, module: nn.Module) -> None:
        undo.callback(self.network.set_submodule, name, self.network.get_submodule(name))
        self.network.set_submodule(name, module)

    def _process(self, undo: contextlib.ExitStack, number: int, site: Site) -> None:
        attention = self.network.get_submodule(site.name)
        undo.callback(setattr, attention, "processor", attention.processor)
        attention.processor = (
            _Spatial(self, number) if site.kind is SiteKind.SPATIAL else _Cross(self)
        )

    def _hook_skips(self, undo: contextlib.ExitStack) -> None:
        for number, skip in enumerate(self.skips):
            reader = self.network.get_submodule(skip.reader)
            hook = _reroute(self, number, skip)
            undo.callback(reader.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _keep_features(self, _: nn.Module, __: object, output: Any) -> None:
        # Down blocks return what their skip connections carry as well.
        self._features.append(output[0] if isinstance(output, tuple) else output)

    def level_of(self, site: Site) -> int:
        """How often the latents are halved before a site."""
        if site.place == "in":
            return 0
        if site.place == "mid":
            return self.levels - 1
        number = int(site.name.split(".")[1])
        return number if site.place == "down" else self.levels - 1 - number

    def attend(
        self, operator: str, query: Tensor, key: Tensor, value: Tensor, heads: int, number: int
    ) -> Tensor:
        """A site's node, with the controls of the site."""
        node = find_node(operator, self.controls)
        inputs, level = self._given.inputs, self.level_of(self.sites[number])
        given = {"query": query, "key": key, "value": value}
        if "query" in node.controls:
            given["query_row"] = inputs["query_row"][number]
            given["query_blend"] = inputs[f"query_blend.{level}"]
        if "reduced" in node.controls:
            given["query_reduced"] = inputs["query_reduced"]
        if "deviation" in node.controls:
            share = inputs["deviation_blend"][number][:, None, None]
            given["deviation_row"] = inputs["deviation_row"][number]
            given["deviation_blend"] = share * inputs[f"deviation_region.{level}"]
            given["deviation_parts"] = inputs["deviation_parts"]
        out: Tensor = node.call(*(given[name] for name in node.inputs), heads)
        return out

    def move(self, normed: Tensor, site: str) -> tuple[Tensor, Tensor]:
        """What a temporal site projects to q and k, and to v: x + m."""
        if "motion" not in self.controls:
            return normed, normed
        inputs, add = self._given.inputs, NODES["motion_addition"].call
        slot, scale = inputs["motion_slot"], inputs["motion_scale"]
        return (
            add(normed, slot, scale, inputs[f"motion.{site}.query_key"]),
            add(normed, slot, scale, inputs[f"motion.{site}.value"]),
        )

    def project(self, linear: nn.Module, path: str, given: Tensor) -> Tensor:
        """W x, and each row's low-rank change of it."""
        projected: Tensor = linear(given)
        if "lora" not in self.controls:
            return projected
        inputs = self._given.inputs
        changed: Tensor = NODES["low_rank_addition"].call(
            projected,
            given,
            inputs["lora_slot"],
            inputs["lora_scale"],
            inputs[f"lora.{path}.down"],
            inputs[f"lora.{path}.up"],
        )
        return changed

    @property
    def given(self) -> _Given:
        """What the forward pass under way was given."""
        return self._given

    def list_inputs(self, precision: str) -> tuple[TensorInfo, ...]:
        """All inputs, in order."""
        config = self.network.config
        own = (
            TensorInfo(
                "latents", precision, ("rows", config.in_channels, "frames", "height", "width")
            ),
            TensorInfo("timesteps", "float32", ("rows",)),
            TensorInfo("text", precision, ("rows", "text_tokens", self._text_width())),
        )
        kinds = {
            "query": self._query_inputs(),
            "reduced": (TensorInfo("query_reduced", "float32", ("rows",)),),
            "deviation": self._deviation_inputs(),
            "motion": self._motion_inputs(precision),
            "lora": self._lora_inputs(precision),
            "skip": tuple(
                TensorInfo(name, "float32", (len(self.skips), "rows"))
                for name in ("skip_source", "skip_gain")
            ),
        }
        carried = tuple(tensor for kind in KINDS if kind in self.controls for tensor in kinds[kind])
        tapped = (TensorInfo("feature_channels", "int64", ("feature_channels",)),)
        return own + carried + (() if self.tap is None else tapped)

    def list_outputs(self, precision: str) -> tuple[TensorInfo, ...]:
        """All outputs, in order."""
        channels = self.network.config.out_channels
        prediction = TensorInfo(
            "prediction", precision, ("rows", channels, "frames", "height", "width")
        )
        if self.tap is None:
            return (prediction,)
        sides = ("feature_height", "feature_width")
        features = ("rows", "frames", *sides, self.tap.channels)
        motion = ("rows", "frames", "feature_tokens", "feature_channels")
        return (
            prediction,
            TensorInfo("features", precision, features),
            TensorInfo("motion", precision, motion),
        )

    def _text_width(self) -> int:
        for site in self.sites:
            if site.kind is SiteKind.CROSS:
                width: int = self.network.get_submodule(site.name).to_k.in_features
                return width
        raise CheckpointError("export: the network must attend to a prompt, and has no such site")

    def _levels_of(self, kinds: Collection[SiteKind]) -> list[int]:
        return sorted({self.level_of(site) for site in self.sites if site.kind in kinds})

    def _query_inputs(self) -> tuple[TensorInfo, ...]:
        levels = self._levels_of((SiteKind.SPATIAL, SiteKind.TEMPORAL))
        return (
            TensorInfo("query_row", "int64", (len(self.sites), "rows")),
            *(_blend(f"query_blend.{level}", level) for level in levels),
        )

    def _deviation_inputs(self) -> tuple[TensorInfo, ...]:
        return (
            TensorInfo("deviation_row", "int64", (len(self.sites), "rows")),
            TensorInfo("deviation_blend", "float32", (len(self.sites), "rows")),
            TensorInfo("deviation_parts", "float32", ("rows", 3)),
            *(
                _blend(f"deviation_region.{level}", level)
                for level in self._levels_of((SiteKind.TEMPORAL,))
            ),
        )

    def _motion_inputs(self, precision: str) -> tuple[TensorInfo, ...]:
        banks = []
        for site in self.sites:
            if site.kind is SiteKind.TEMPORAL:
                tokens = f"motion_tokens_{self.level_of(site)}"
                for part, places in (("query_key", 1), ("value", tokens)):
                    axes = ("motion_slots", "frames", places, site.width)
                    banks.append(TensorInfo(f"motion.{site.name}.{part}", precision, axes))
        return (
            TensorInfo("motion_slot", "int64", ("rows",)),
            TensorInfo("motion_scale", "float32", ("rows",)),
            *banks,
        )

    def _lora_inputs(self, precision: str) -> tuple[TensorInfo, ...]:
        banks = []
        for path in self._projections():
            linear = self.network.get_submodule(path)
            down = ("lora_slots", "lora_rank", linear.in_features)
            up = ("lora_slots", linear.out_features, "lora_rank")
            banks.append(TensorInfo(f"lora.{path}.down", precision, down))
            banks.append(TensorInfo(f"lora.{path}.up", precision, up))
        return (
            TensorInfo("lora_slot", "int64", ("rows",)),
            TensorInfo("lora_scale", "float32", ("rows",)),
            *banks,
        )

    def _projections(self) -> Iterator[str]:
        """Module paths of what a LoRA may change."""
        temporal = {site.name for site in self.sites if site.kind is SiteKind.TEMPORAL}
        for name in temporal_transformers(self.network, self.family):
            blocks = self.network.get_submodule(name).transformer_blocks
            for number, block in enumerate(blocks):
                path = f"{name}.transformer_blocks.{number}"
                for attention in ("attn1", "attn2"):
                    if f"{path}.{attention}" in temporal:
                        yield from (f"{path}.{attention}.{part}" for part in _PROJECTIONS)
                        yield f"{path}.{attention}.to_out.0"
                if _is_gated(block.ff):
                    yield from (f"{path}.ff.net.0.proj", f"{path}.ff.net.2")


class _Spatial:
    """Self-attention of a frame to itself, as `kinetiq.attention.SpatialProcessor`."""

    def __init__(self, graph: NetworkGraph, number: int) -> None:
        self._graph, self._number = graph, number

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        given = self._graph.given
        rows = hidden_states.view(given.rows, given.frames, *hidden_states.shape[1:])
        query, key, value = (getattr(attention, name)(rows) for name in _PROJECTIONS)
        out = self._graph.attend(
            "query_attention", query, key, value, attention.heads, self._number
        )
        return _project_out(attention, out.flatten(0, 1))


class _Cross:
    """Attention to the prompt, as `kinetiq.attention.CrossProcessor`."""

    def __init__(self, graph: NetworkGraph) -> None:
        self._graph = graph

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        given = self._graph.given
        query = attention.to_q(hidden_states)
        query = query.view(given.rows, given.frames, *query.shape[1:])
        key, value = (part(given.text)[:, None] for part in (attention.to_k, attention.to_v))
        out = NODES["query_attention_text"].call(query, key, value, attention.heads)
        return _project_out(attention, out.flatten(0, 1))


class _Transformer(nn.Module):
    """A temporal transformer, as `kinetiq.attention.TemporalTransformer`."""

    def __init__(
        self, replaced: Any, name: str, numbers: Mapping[str, int], graph: NetworkGraph
    ) -> None:
        super().__init__()
        self.norm = replaced.norm
        self.proj_in = replaced.proj_in
        self.transformer_blocks = replaced.transformer_blocks
        self.proj_out = replaced.proj_out
        self._name, self._numbers = name, numbers
        self._graph = [graph]  # not a part of this module
        self._returns_tuple = type(replaced).__name__ == "TransformerTemporalModel"

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """Map [rows * frames, channels, h, w] to the same."""
        graph = self._graph[0]
        given = graph.given
        given.before_temporal[self._name] = hidden_states
        channels, height, width = hidden_states.shape[1:]
        rows = hidden_states.reshape(given.rows, given.frames, channels, height * width)
        normed = F.group_norm(
            rows.transpose(1, 2),
            self.norm.num_groups,
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
        )
        tokens = self.proj_in(normed.permute(0, 2, 3, 1))
        for number, block in enumerate(self.transformer_blocks):
            tokens = self._block(block, f"{self._name}.transformer_blocks.{number}", tokens)
        out = self.proj_out(tokens).transpose(2, 3).reshape(hidden_states.shape) + hidden_states
        return (out,) if self._returns_tuple else out

    def _block(self, block: Any, path: str, tokens: Tensor) -> Tensor:
        graph = self._graph[0]
        layers = [("attn1", block.norm1, block.attn1), ("attn2", block.norm2, block.attn2)]
        for name, norm, attention in layers:
            if attention is None:
                continue
            normed = norm(tokens)
            if block.pos_embed is not None:
                position = block.pos_embed.pe[0, : tokens.shape[1], None]
                normed = normed + position.to(normed.dtype)
            tokens = tokens + self._attend(attention, f"{path}.{name}", normed)
        given = block.norm3(tokens)
        if not _is_gated(block.ff):
            changed: Tensor = block.ff(given)
            return tokens + changed
        gated, _, last = block.ff.net
        hidden, gate = graph.project(gated.proj, f"{path}.ff.net.0.proj", given).chunk(2, dim=-1)
        return tokens + graph.project(last, f"{path}.ff.net.2", hidden * gated.gelu(gate))

    def _attend(self, attention: Any, path: str, normed: Tensor) -> Tensor:
        graph = self._graph[0]
        for_query_key, for_value = graph.move(normed, path)
        query, key, value = (
            graph.project(getattr(attention, name), f"{path}.{name}", given)
            for name, given in zip(
                _PROJECTIONS, (for_query_key, for_query_key, for_value), strict=True
            )
        )
        out = graph.attend(
            "frame_attention", query, key, value, attention.heads, self._numbers[path]
        )
        projected = graph.project(attention.to_out[0], f"{path}.to_out.0", out)
        return _rescaled(attention, projected)


def _reroute(graph: NetworkGraph, number: int, skip: Skip) -> Any:
    """What lets a reader see its skip as `SkipControl` says, as in `kinetiq.skips`."""

    def reroute(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        inputs = graph.given.inputs
        source, gain = inputs["skip_source"][number], inputs["skip_gain"][number]
        joined = given[0] if given else named["input_tensor"]
        if skip.temporal is None:
            rerouted = NODES["skip_scaling"].call(joined, gain, skip.channels)
        else:
            before = graph.given.before_temporal[skip.temporal]
            rerouted = NODES["skip_rerouting"].call(joined, before, source, gain, skip.channels)
        if given:
            return (rerouted, *given[1:]), named
        return given, {**named, "input_tensor": rerouted}

    return reroute


def _project_out(attention: Any, out: Tensor) -> Tensor:
    return _rescaled(attention, attention.to_out[0](out))


def _rescaled(attention: Any, projected: Tensor) -> Tensor:
    factor: float = attention.rescale_output_factor
    return projected if factor == 1 else projected / factor


def _is_gated(feed_forward: Any) -> bool:
    """Whether a feed-forward is one that a LoRA can change."""
    return type(feed_forward.net[0]).__name__ == "GEGLU" and len(feed_forward.net) == 3


def _pointwise(module: nn.Conv2d) -> nn.Conv2d:
    """The centre of a kernel that is zero elsewhere, as a kernel of one element."""
    weight = module.weight.detach()[:, :, 1:2, 1:2].contiguous()
    out = nn.Conv2d(module.in_channels, module.out_channels, 1, bias=False, device="meta")
    out.weight = nn.Parameter(weight, requires_grad=False)
    out.bias = module.bias
    return out


def _blend(name: str, level: int) -> TensorInfo:
    return TensorInfo(name, "float32", ("rows", "frames", f"tokens_{level}"))
