"""The network's attention sites as modules that read control tensors.

Spatial and cross-attention sites are diffusers attention processors. A temporal transformer is
replaced by `TemporalTransformer`, which owns the very parameters of the module it replaces and
keeps its tensors [rows, frames, tokens, channels], so that no frame is moved into the batch and
back. Both read what the current forward pass is given from a `Signal`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kinetiq.control_tensors import (
    ControlTensors,
    DeviationControl,
    KeyValueBank,
    LoraControl,
    MotionControl,
    SharedKeyControl,
    at_site,
)
from kinetiq.errors import CheckpointError, RequestError
from kinetiq.kernels import frame_attention, query_attention, temporal_block
from kinetiq.kernels.frame_attention import Controls, MotionControls, add_motion, mix
from kinetiq.kernels.query_attention import choose_queries, reduce_leak
from kinetiq.kernels.temporal_block import wins
from kinetiq.profiling import span
from kinetiq.query_flow import flow_queries
from kinetiq.refinement import refine_outputs


@dataclass
class KeyValueCapture:
    """Keeps the keys and values that some rows have at some spatial sites.

    Args:
        sites: indices of the sites.
        rows: int64, which rows of the forward pass.
        kept: by site, one slot a row; filled by the forward pass.
    """

    sites: Collection[int]
    rows: Tensor
    kept: dict[int, KeyValueBank] = field(default_factory=dict)


@dataclass
class WordCapture:
    """Keeps how much attention some rows' places pay to words of their prompts.

    Args:
        rows: int64 [n], which rows of the forward pass.
        words: [n, text tokens], weights that add up to 1 in each row.
        kept: by cross-attention site, float32 [n, frames, tokens], the mean over heads; filled by
            the forward pass.
    """

    rows: Tensor
    words: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class OutputCapture:
    """Keeps what one temporal site adds to its input.

    Args:
        site: index of the site.
        kept: [rows, frames, tokens, channels]; None before the forward pass.
    """

    site: int
    kept: Tensor | None = None


@dataclass
class Signal:
    """What the forward pass that is under way was given; written by the denoiser alone."""

    frames: int = 1
    controls: ControlTensors = ControlTensors()  # noqa: RUF009  frozen, so safe to share
    prompt_keys: Mapping[int, KeyValueBank] | None = None  # by cross-attention site, a slot a row
    before_temporal: dict[str, Tensor] = field(default_factory=dict)  # by temporal transformer
    capture: KeyValueCapture | None = None
    word_capture: WordCapture | None = None
    output_capture: OutputCapture | None = None


_PROJECTIONS = ("to_q", "to_k", "to_v")


class SpatialProcessor:
    """Self-attention of a frame to itself, with queries, further keys and outputs as controlled."""

    def __init__(self, site: int, signal: Signal) -> None:
        self._site = site
        self._signal = signal

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Follow diffusers' protocol of attention processors."""
        _refuse(attention, attention_mask, options)
        with span("spatial attention"):
            frames = self._signal.frames
            rows = hidden_states.unflatten(0, (-1, frames))
            query, key, value = (
                project(rows) for project in (attention.to_q, attention.to_k, attention.to_v)
            )
            key, value = _given_keys(key, value, self._site, self._signal)
            preserve = self._signal.controls.preserve
            if preserve is not None:
                kept = query.index_select(0, preserve.guides)
                query = query.index_copy(0, preserve.readers, kept)
            for flow in self._signal.controls.flow:
                query = flow_queries(query, flow)
            query, row, blend = _controlled_query(query, self._site, self._signal)
            out = _attend(
                query, key, value, attention.heads, row, blend, self._signal.controls.shared_key
            )
            for refine in self._signal.controls.refine:
                out = refine_outputs(out, refine)
            return _project_out(attention, out.flatten(0, 1))


class CrossProcessor:
    """Attention of all frames of a row to its prompt, whose keys are computed once a row."""

    def __init__(self, site: int, signal: Signal) -> None:
        self._site = site
        self._signal = signal

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Follow diffusers' protocol of attention processors."""
        _refuse(attention, attention_mask, options)
        if encoder_hidden_states is None:
            raise CheckpointError("cross-attention: the network must be given a prompt, got none")
        with span("cross attention"):
            frames = self._signal.frames
            query = attention.to_q(hidden_states).unflatten(0, (-1, frames))
            given = self._signal.prompt_keys
            if given is not None:
                key, value = given[self._site].key, given[self._site].value
            else:
                text = encoder_hidden_states  # one a row, or repeated for each frame by the network
                if text.shape[0] != query.shape[0]:
                    text = text.unflatten(0, (-1, frames))[:, 0]
                key, value = project_prompt(attention, text)
            capture = self._signal.word_capture
            if capture is not None:
                capture.kept[self._site] = attention_to_words(
                    query, key, attention.heads, capture.rows, capture.words
                )
            out = query_attention(query, key, value, heads=attention.heads)
            return _project_out(attention, out.flatten(0, 1))


def project_prompt(attention: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of prompts [rows, tokens, width], each [rows, 1, tokens, channels]."""
    return attention.to_k(text)[:, None], attention.to_v(text)[:, None]


class TemporalTransformer(nn.Module):
    """A temporal transformer that reads control tensors; shares the replaced module's parameters.

    GroupNorm over each row's frames, projection, blocks of frame position, self-attention over
    frames (one or two) and feed-forward, projection, residual: what diffusers'
    `AnimateDiffTransformer3D` and `TransformerTemporalModel` compute.

    Args:
        replaced: the module it stands in for.
        name: its module path, by which LoRAs know its projections.
        sites: for each block, the site indices of its self-attentions.
        signal: where the current forward pass's controls are read.
    """

    def __init__(self, replaced: Any, name: str, sites: list[list[int]], signal: Signal) -> None:
        super().__init__()
        self.norm: nn.GroupNorm = replaced.norm
        self.proj_in: nn.Linear = replaced.proj_in
        self.transformer_blocks: nn.ModuleList = replaced.transformer_blocks
        self.proj_out: nn.Linear = replaced.proj_out
        self._name = name
        self._sites = sites
        self._signal = signal
        self._returns_tuple = type(replaced).__name__ == "TransformerTemporalModel"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Map [rows * frames, channels, h, w] to the same, as the replaced module does."""
        with span("temporal transformer"):
            if self._signal.controls.skip is not None:
                self._signal.before_temporal[self._name] = hidden_states
            height, width = hidden_states.shape[-2:]
            rows = hidden_states.unflatten(0, (-1, num_frames)).flatten(3)  # [R, F, C, tokens]
            tokens = self.proj_in(_group_norm(rows, self.norm).transpose(2, 3))
            blocks = zip(self.transformer_blocks, self._sites, strict=True)
            for number, (block, sites) in enumerate(blocks):
                path = f"{self._name}.transformer_blocks.{number}"
                tokens = self._block(block, path, sites, tokens)
            out = self.proj_out(tokens).transpose(2, 3).unflatten(3, (height, width)).flatten(0, 1)
            out = out + hidden_states
        return (out,) if self._returns_tuple else out

    def _block(self, block: Any, path: str, sites: list[int], tokens: Tensor) -> Tensor:
        layers = [("attn1", block.norm1, block.attn1)]
        if block.attn2 is not None:
            layers.append(("attn2", block.norm2, block.attn2))
        position = None if block.pos_embed is None else block.pos_embed.pe[0, : tokens.shape[1]]
        for (name, norm, attention), site in zip(layers, sites, strict=True):
            _refuse(attention, None, {})
            capture = self._signal.output_capture
            if capture is not None and capture.site != site:
                capture = None
            controls = self._signal.controls
            bare = capture is None and not _acts_within(controls, f"{path}.{name}")
            if bare and _fuses(norm, attention, tokens):
                motion = _motion_of(controls.motion, site)
                tokens = _fused(norm, attention, position, tokens, motion)
                continue
            normed = norm(tokens)
            if position is not None:
                normed = normed + position[:, None].to(normed.dtype)
            added = self._attend(attention, f"{path}.{name}", site, normed)
            if capture is not None:
                capture.kept = added
            tokens = tokens + added
        lora = self._signal.controls.lora
        return tokens + _feed_forward(block.ff, f"{path}.ff", block.norm3(tokens), lora)

    def _attend(self, attention: Any, path: str, site: int, normed: Tensor) -> Tensor:
        controls = self._signal.controls
        motion, lora = controls.motion, controls.lora
        for_query_key = for_value = normed
        if motion is not None and lora is not None and _adapts(lora, path):
            # The projections differ from row to row, so the embedding goes through them with x.
            for_query_key, for_value = _move(normed, motion, site)
            motion = None
        query, key, value = (
            _project(getattr(attention, name), f"{path}.{name}", given, lora)
            for name, given in zip(
                _PROJECTIONS, (for_query_key, for_query_key, for_value), strict=True
            )
        )
        kept: Controls = {
            **_motion_of(motion, site),
            **_deviation_of(controls.deviation, site, normed.shape[2]),
        }
        if kept and controls.query is not None and controls.query.reduced is not None:
            # The operator adds motions and moves deviations before it chooses queries. Leak-reduced
            # queries are chosen here, so for the same order the others come first here too.
            query, key, value = mix(query, key, value, **kept)
            kept = {}
        query, row, blend = _controlled_query(query, site, self._signal)
        kept = {**kept, "query_row": row, "query_blend": blend}
        with span("temporal attention"):
            out = frame_attention(query, key, value, heads=attention.heads, **kept)
        if lora is None or f"{path}.to_out.0" not in lora.banks:
            return _project_out(attention, out)
        projected: Tensor = _project(attention.to_out[0], f"{path}.to_out.0", out, lora)
        return _rescale(attention, attention.to_out[1](projected))


def _project(linear: nn.Module, path: str, given: Tensor, lora: LoraControl | None) -> Tensor:
    """W x, and each row's low-rank change of it."""
    out: Tensor = linear(given)
    bank = None if lora is None else lora.banks.get(path)
    if lora is None or bank is None:
        return out
    down = bank.down.index_select(0, lora.slot).to(given.dtype)
    up = bank.up.index_select(0, lora.slot).to(given.dtype)
    rank = given.flatten(1, -2) @ down.transpose(1, 2) * lora.scale.to(given.dtype)[:, None, None]
    return out + (rank @ up.transpose(1, 2)).view(out.shape)


def _feed_forward(ff: Any, path: str, given: Tensor, lora: LoraControl | None) -> Tensor:
    first, second = f"{path}.net.0.proj", f"{path}.net.2"
    if lora is None or not {first, second} & set(lora.banks):
        out: Tensor = ff(given)
        return out
    gated, dropout, last = ff.net[:3]
    if type(gated).__name__ != "GEGLU" or len(ff.net) != 3:
        raise CheckpointError(
            f"{path}: a LoRA of a feed-forward needs GEGLU, got {type(gated).__name__}"
        )
    hidden, gate = _project(gated.proj, first, given, lora).chunk(2, dim=-1)
    return _project(last, second, dropout(hidden * gated.gelu(gate)), lora)


def _motion_of(control: MotionControl | None, site: int) -> MotionControls:
    """What operators are told of motion embeddings at a site."""
    bank = None if control is None else control.banks.get(site)
    if control is None or bank is None:
        return {}
    return {
        "motion_slot": control.slot,
        "motion_scale": control.scale,
        "query_bank": bank.projected_query,
        "key_bank": bank.projected_key,
        "value_bank": bank.projected_value,
    }


def _adapts(lora: LoraControl, path: str) -> bool:
    return any(f"{path}.{name}" in lora.banks for name in _PROJECTIONS)


def _move(normed: Tensor, control: MotionControl, site: int) -> tuple[Tensor, Tensor]:
    """What a site projects to q and k, and to v: x + m, by each row's slot and scale."""
    bank = control.banks.get(site)
    if bank is None:
        return normed, normed
    if (bank.query_key is None) != (bank.projected_query is None) or (
        (bank.value is None) != (bank.projected_value is None)
    ):
        raise RequestError(
            "motion: the embedding itself must be given beside its projections where a LoRA "
            f"changes them, got projections alone at site {site}"
        )
    moved = [
        normed if added is None else add_motion(normed, control.slot, control.scale, added)
        for added in (bank.query_key, bank.value)
    ]
    return moved[0], moved[1]


def _fuses(norm: Any, attention: Any, tokens: Tensor) -> bool:
    """Whether one kernel for the whole layer computes it, and was measured to be quicker.

    Not where gradients are wanted, since its own runs the separate operators again; nor where
    autocast chooses types within the layer; nor where a layer is more than its weights, such as a
    LoRA around a projection.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled(tokens.device.type):
        return False
    out, dropout = attention.to_out
    projections = (attention.to_q, attention.to_k, attention.to_v)
    rows, frames, positions, width = tokens.shape
    heads = attention.heads
    return (
        type(norm) is nn.LayerNorm
        and all(vector is not None for vector in (norm.weight, norm.bias))
        and all(_is_plain(linear) and linear.bias is None for linear in projections)
        and _is_plain(out)
        and out.bias is not None
        and type(dropout) is nn.Dropout
        and not (dropout.training and dropout.p)
        and attention.rescale_output_factor == 1.0
        and wins(rows, frames, positions, heads, width // heads, tokens.dtype, tokens.device)
    )


def _acts_within(controls: ControlTensors, path: str) -> bool:
    """Whether a control acts in a temporal layer that one kernel for all of it does not know.

    It knows motion embeddings. Whether a row reads another one's queries or deviations at a site
    is data, so where any row of the batch does anywhere, they may be read at every site.
    """
    if controls.query is not None or controls.deviation is not None:
        return True
    lora = controls.lora
    return lora is not None and (_adapts(lora, path) or f"{path}.to_out.0" in lora.banks)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear map by its weights, which nobody listens to or changes."""
    listened = module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001  no public way
    return type(module) is nn.Linear and not listened


def _fused(
    norm: Any, attention: Any, position: Tensor | None, tokens: Tensor, motion: MotionControls
) -> Tensor:
    with span("temporal block"):
        return temporal_block(
            tokens,
            norm.weight,
            norm.bias,
            attention.to_q.weight,
            attention.to_k.weight,
            attention.to_v.weight,
            attention.to_out[0].weight,
            attention.to_out[0].bias,
            heads=attention.heads,
            position=None if position is None else position.to(tokens.dtype),
            eps=norm.eps,
            **motion,
        )


def _deviation_of(control: DeviationControl | None, site: int, tokens: int) -> Controls:
    """What `frame_attention` is told of deviations at a site."""
    if control is None:
        return {}
    share = control.blend[site]
    if control.region is not None:
        share = share[:, None, None] * at_site(control.region, tokens)
    return {
        "deviation_row": control.row[site],
        "deviation_blend": share,
        "deviation_parts": control.parts,
    }


def _given_keys(key: Tensor, value: Tensor, site: int, signal: Signal) -> tuple[Tensor, Tensor]:
    """The keys and values that rows of a spatial site use; their own are kept where wanted."""
    capture, control = signal.capture, signal.controls.key_value
    if capture is not None and site in capture.sites:
        rows = capture.rows
        capture.kept[site] = KeyValueBank(key.index_select(0, rows), value.index_select(0, rows))
    bank = None if control is None else control.banks.get(site)
    if control is None or bank is None:
        return key, value
    given = (control.slot > 0).reshape(-1, 1, 1, 1)
    slot = (control.slot - 1).clamp(min=0)
    return (
        torch.where(given, bank.key.index_select(0, slot).to(key.dtype), key),
        torch.where(given, bank.value.index_select(0, slot).to(value.dtype), value),
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    row: Tensor | None,
    blend: Tensor | None,
    shared: SharedKeyControl | None,
) -> Tensor:
    """Attention within frames, and of the rows that see others to those as well."""
    if shared is None:
        return query_attention(query, key, value, heads=heads, query_row=row, query_blend=blend)
    if row is not None:
        query = choose_queries(query, row, blend)
    # Apart, since on a CPU a row pays for as many further keys as any row of its call has.
    seeing, alone = (
        [tensor.index_select(0, rows) for tensor in (query, key, value)]
        for rows in (shared.readers, shared.alone)
    )
    mask = at_site(shared.mask, key.shape[2]).log()
    seen = query_attention(*seeing, heads=heads, key_rows=shared.rows, key_log_mask=mask)
    out = torch.empty_like(query).index_copy_(0, shared.readers, seen)
    if len(shared.alone):
        out.index_copy_(0, shared.alone, query_attention(*alone, heads=heads))
    return out


def attention_to_words(
    query: Tensor, key: Tensor, heads: int, rows: Tensor, words: Tensor
) -> Tensor:
    """How much attention the places of some rows pay to words, as a mean over heads.

    Args:
        query: [rows, frames, tokens, heads * d].
        key: [rows, 1, text tokens, heads * d].
        heads: of the attention.
        rows: int64 [n].
        words: [n, text tokens], the weight of each text token.

    Returns:
        float32 [n, frames, tokens].
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    maps = []
    # One row at a time, since scores are large; by an index, since a number waits for the device.
    for row, weights in zip(rows.split(1), words.to(wide), strict=True):
        chosen = (t.index_select(0, row)[0].to(wide) for t in (query, key))
        q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in chosen)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [frames, heads, tokens, text]
        maps.append((scores.softmax(-1) @ weights).mean(1))
    return torch.stack(maps)


def _controlled_query(
    query: Tensor, site: int, signal: Signal
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The query tensor, the row index and the blend that a site hands to its operator."""
    control = signal.controls.query
    if control is None:
        return query, None, None
    row, blend = control.row[site], control.blend
    if blend.ndim == 4:
        blend = at_site(blend, query.shape[2])
    if control.reduced is None:
        return query, row, blend
    moved = reduce_leak(query, row, control.reduced)
    share = blend.to(query.dtype).reshape(*blend.shape, *([1] * (query.ndim - blend.ndim)))
    own = torch.arange(len(row), device=row.device) == row
    share = torch.where(own.reshape(-1, 1, 1, 1), torch.zeros_like(share), share)
    return torch.lerp(query, moved, share), None, None


def _group_norm(rows: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm of [rows, frames, channels, tokens] with statistics over all frames of a row."""
    grouped = rows.unflatten(2, (norm.num_groups, -1))
    wide = grouped.to(torch.promote_types(rows.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=(1, 3, 4), correction=0, keepdim=True)
    normed = ((wide - mean) * torch.rsqrt(variance + norm.eps)).flatten(2, 3)
    out: Tensor = (normed * norm.weight[:, None] + norm.bias[:, None]).to(rows.dtype)
    return out


def _project_out(attention: Any, out: Tensor) -> Tensor:
    return _rescale(attention, attention.to_out[1](attention.to_out[0](out)))


def _rescale(attention: Any, projected: Tensor) -> Tensor:
    """The last step of diffusers' attention, a pass over the activations unless the factor is 1."""
    # By 1 it would be a pass for nothing, 6 GB a step of AnimateDiff.
    factor: float = attention.rescale_output_factor
    return projected if factor == 1.0 else projected / factor


def _refuse(attention: Any, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
    """Features of diffusers' attention that no supported network uses are refused, not ignored."""
    unused = {
        "an attention mask": attention_mask is not None,
        "group_norm": attention.group_norm is not None,
        "spatial_norm": attention.spatial_norm is not None,
        "norm_q": attention.norm_q is not None,
        "a residual connection": attention.residual_connection,
        "options " + ", ".join(options): bool(options),
    }
    found = [name for name, present in unused.items() if present]
    if found:
        raise CheckpointError(
            f"attention: the network must use plain attention modules, got {', '.join(found)}"
        )
