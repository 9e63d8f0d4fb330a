"""Whether attention has work to do in the embedded model, site by site."""

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.engine import Engine
from kinetiq.sprites.cases import transfer_pairs
from kinetiq.sprites.probe import probe_sites


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Entropy and effect of every attention site, on references of every motion."""
    pairs = transfer_pairs(2 if options.quick else 8, seed=options.seed)
    figures: dict[str, Figure] = {}
    with Engine.load("sprites", device=options.device) as engine:
        for probe in probe_sites(engine, pairs):
            name = f"probe.{probe.site.kind}.{probe.site.name.replace('.transformer_blocks.0', '')}"
            figures[f"{name}.entropy"] = Figure(probe.entropy, n=len(pairs))
            figures[f"{name}.effect"] = Figure(probe.effect, n=len(pairs))
    return figures


BENCH = Bench("probe", "what each attention site of the embedded model does", measure)
