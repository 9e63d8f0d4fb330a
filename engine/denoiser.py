"""The denoiser: a network with our attention at its sites, and what it is given each step.

`attach` puts processors, temporal modules and centre-tap convolutions into a loaded diffusers
network; `detach` puts the stock ones back, so that the network is bit for bit what it was.
diffusers' own forward methods are never patched.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from kinetiq.attention import (
    CrossProcessor,
    KeyValueCapture,
    OutputCapture,
    Signal,
    SpatialProcessor,
    TemporalTransformer,
    WordCapture,
)
from kinetiq.control_tensors import ControlTensors, KeyValueBank, size_at
from kinetiq.convolution import CentreTapConvolution, find_centre_taps
from kinetiq.errors import RequestError
from kinetiq.families import (
    Family,
    Site,
    SiteKind,
    detect_family,
    list_sites,
    temporal_transformers,
)
from kinetiq.skips import attach_skips, list_skips
from kinetiq.taps import DEFAULT_TAP, Tap, find_tap, run_to_tap

NO_CONTROLS = ControlTensors()


@dataclass
class Watched:
    """What was seen of some rows while the network ran.

    Args:
        words: by cross-attention site, float32 [n, frames, tokens]: the attention that is paid to
            words of the prompt; empty where none are watched, and before the network ran.
        features: float32 [n, frames, channels, h, w], the output of the tap; None likewise.
    """

    words: dict[int, Tensor]
    features: Tensor | None = None

    def part(self, rows: slice, *, words: bool, features: bool) -> "Watched":
        """The same of some of the rows, and of the two only what is asked for."""
        return Watched(
            {site: kept[rows] for site, kept in self.words.items()} if words else {},
            self.features[rows] if features and self.features is not None else None,
        )


class Denoiser(Protocol):
    """What every back end offers: one prediction for a batch of rows."""

    family: Family
    sites: tuple[Site, ...]
    most_rows: int | None
    """Of a batch; None: as many as memory holds."""
    multiple: int
    """What height and width of latents must be multiples of."""

    def predict(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, controls: ControlTensors
    ) -> Tensor:
        """Return the network's output.

        Args:
            latents: [rows, channels, frames, h, w], scaled as the network wants them.
            timesteps: [rows]; rows may be at different steps.
            text: [rows, tokens, width].
            controls: one entry a row.
        """
        ...

    def features(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, controls: ControlTensors, tap: str
    ) -> Tensor:
        """Return what one block or temporal attention makes of its input; see `kinetiq.taps`.

        The arguments but the last are those of `predict`. Nothing behind the tap is run, but for
        the rest of the temporal transformer that a tapped attention lies in. What is returned can
        be differentiated.

        Args:
            latents: see `predict`, as for the next three.
            timesteps: likewise.
            text: likewise.
            controls: likewise; they act as there.
            tap: module path of the block or attention.

        Returns:
            [rows, frames, h, w, channels], at the size of the tap, in any strides.
        """
        ...

    def keeping(
        self, sites: Collection[int], rows: Tensor
    ) -> AbstractContextManager[Mapping[int, KeyValueBank]]:
        """Keep the keys and values that rows have at spatial sites while the network runs.

        Args:
            sites: indices of the sites.
            rows: int64, on the device of the network.

        Returns:
            A context for one `predict` or `features`; after it, one slot a row at each site.
        """
        ...

    def watching(self, rows: Tensor, words: Tensor, tap: str) -> AbstractContextManager[Watched]:
        """Keep where rows look for words of their prompts, and what they are at a tap.

        Args:
            rows: int64 [n], on the device of the network.
            words: [n, text tokens], weights that add up to 1 in each row; [n, 0]: no attention is
                kept.
            tap: module path of a block, see `kinetiq.taps`; "": no features are kept.

        Returns:
            A context for one `predict`, which fills what it yields.
        """
        ...


class EagerDenoiser:
    """A diffusers network run by PyTorch as it is.

    Args:
        network: of a supported family.
        keep_zero_taps: whether kernels that are zero but for their centres stay so in training;
            without it they run by their centres only where nothing trains them.

    Attributes:
        signal: what the forward pass under way was given; who runs a part of the network again,
            as recomputation does, gives it what it was given before.
    """

    most_rows: int | None = None
    multiple: int = 1

    def __init__(self, network: Any, *, keep_zero_taps: bool = False) -> None:
        self.family = detect_family(network)
        self.sites = list_sites(network, self.family)
        self.skips = list_skips(network, self.family)
        self.network = network
        self._keep_zero_taps = keep_zero_taps
        self.signal = Signal()
        self._processors: dict[str, Any] = {}
        self._replaced: dict[str, nn.Module] = {}
        self._hooks: list[Any] = []

    @property
    def attached(self) -> bool:
        """Whether our modules are in the network."""
        return bool(self._replaced)

    def attach(self) -> "EagerDenoiser":
        """Put our modules into the network; attaching twice is attaching once.

        Weights are not to be replaced until `detach`: what runs was chosen by what they are.
        """
        if self.attached:
            return self
        index = {site.name: number for number, site in enumerate(self.sites)}
        for site in self.sites:
            if site.kind is SiteKind.TEMPORAL:
                continue
            module = self.network.get_submodule(site.name)
            self._processors[site.name] = module.processor
            module.processor = (
                SpatialProcessor(index[site.name], self.signal)
                if site.kind is SiteKind.SPATIAL
                else CrossProcessor(index[site.name], self.signal)
            )
        for name in temporal_transformers(self.network, self.family):
            replaced = self.network.get_submodule(name)
            sites = [
                [
                    index[f"{name}.transformer_blocks.{number}.{attention}"]
                    for attention in ("attn1", "attn2")
                    if f"{name}.transformer_blocks.{number}.{attention}" in index
                ]
                for number in range(len(replaced.transformer_blocks))
            ]
            self._replace(name, TemporalTransformer(replaced, name, sites, self.signal))
        for name, convolution in find_centre_taps(self.network).items():
            if convolution.weight.requires_grad and not self._keep_zero_taps:
                continue
            self._replace(name, CentreTapConvolution(convolution))
        self._hooks = attach_skips(self.network, self.skips, self.signal)
        return self

    def detach(self) -> Any:
        """Put the stock modules back and return the network."""
        for name, module in self._replaced.items():
            _set_submodule(self.network, name, module)
        for name, processor in self._processors.items():
            self.network.get_submodule(name).processor = processor
        self._replaced.clear()
        for hook in self._hooks:
            hook.remove()
        self._processors.clear()
        self._hooks.clear()
        return self.network

    def _replace(self, name: str, module: nn.Module) -> None:
        self._replaced[name] = self.network.get_submodule(name)
        _set_submodule(self.network, name, module)

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        controls: ControlTensors = NO_CONTROLS,
    ) -> Tensor:
        """Return the network's output; see `Denoiser.predict`.

        Raises:
            RequestError: our modules are not in the network, so it would ignore all controls.
        """
        with self._given("predict", latents, controls):
            out: Tensor = self.network(latents, timesteps, text, return_dict=False)[0]
        return out

    def features(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        controls: ControlTensors = NO_CONTROLS,
        tap: str = DEFAULT_TAP,
    ) -> Tensor:
        """Return the output of one block or temporal attention; see `Denoiser.features`.

        Raises:
            RequestError: our modules are not in the network, or it has no such tap.
        """
        found = find_tap(self.network, tap, self.sites)
        with self._given("features", latents, controls), self._capturing(found) as capture:
            hidden = run_to_tap(
                self.network,
                found,
                lambda: self.network(latents, timesteps, text, return_dict=False),
            )
        if capture is None:
            rows: Tensor = hidden.unflatten(0, (-1, latents.shape[2]))
            return rows.movedim(2, -1)
        if capture.kept is None:
            raise RequestError(f"tap: {found.name} must be run by the network, and was not")
        size = size_at(latents.shape[-2], latents.shape[-1], capture.kept.shape[2])
        added: Tensor = capture.kept.unflatten(2, size)
        return added

    @contextmanager
    def _capturing(self, tap: Tap) -> Iterator[OutputCapture | None]:
        """Keep what a tap's attention adds; None where the tap is a block."""
        if not tap.is_attention:
            yield None
            return
        place = [site.name for site in self.sites].index(tap.name)
        capture = self.signal.output_capture = OutputCapture(place)
        try:
            yield capture
        finally:
            self.signal.output_capture = None

    @contextmanager
    def keeping(self, sites: Collection[int], rows: Tensor) -> Iterator[Mapping[int, KeyValueBank]]:
        """Keep keys and values while the network runs; see `Denoiser.keeping`."""
        capture = self.signal.capture = KeyValueCapture(sites, rows)
        try:
            yield capture.kept
        finally:
            self.signal.capture = None

    @contextmanager
    def watching(self, rows: Tensor, words: Tensor, tap: str) -> Iterator[Watched]:
        """Watch rows while the network runs; see `Denoiser.watching`.

        Raises:
            RequestError: the network has no such block.
        """
        found = find_tap(self.network, tap, self.sites) if tap else None
        if found is not None and found.is_attention:
            raise RequestError(f"tap: must be a block where rows are watched, got {tap!r}")
        block = None if found is None else self.network.get_submodule(found.name)
        capture = WordCapture(rows, words) if words.shape[1] else None
        watched = Watched({} if capture is None else capture.kept)

        def keep(_: object, __: object, output: Any) -> None:
            # Down blocks return what their skip connections carry as well.
            hidden = output[0] if isinstance(output, tuple) else output
            by_row = hidden.unflatten(0, (-1, self.signal.frames))
            watched.features = by_row.index_select(0, rows).float()

        handle = None if block is None else block.register_forward_hook(keep)
        try:
            self.signal.word_capture = capture
            yield watched
        finally:
            self.signal.word_capture = None
            if handle is not None:
                handle.remove()

    def _require_attached(self, where: str) -> None:
        if not self.attached:
            raise RequestError(
                f"{where}: the denoiser must be attached, and was detached or closed"
            )

    @contextmanager
    def _given(self, where: str, latents: Tensor, controls: ControlTensors) -> Iterator[None]:
        """Let our modules see what the forward pass in the block is given."""
        self._require_attached(where)
        self.signal.frames, self.signal.controls = latents.shape[2], controls
        try:
            yield
        finally:
            self.signal.controls = NO_CONTROLS
            self.signal.before_temporal = {}  # not cleared: recomputation keeps it


def _set_submodule(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    owner = network.get_submodule(parent)
    if isinstance(owner, nn.ModuleList):
        owner[int(last)] = module
    else:
        setattr(owner, last, module)
