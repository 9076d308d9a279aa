"""The default connectome, six regions from thalamus to Broca's area, at four sizes."""

from __future__ import annotations

from typing import Any

from neurogen_cy.config import Projection, Region
from neurogen_cy.connectome import BLOCK

REGIONS = ("thalamus", "wernicke", "hippocampus", "pfc", "basal_ganglia", "broca")  # levels 0..5
# In tokens; the other regions have the defaults of Region.
TAU = {"hippocampus": (5.0, 60.0)}
TAU_ADAPT = {"hippocampus": (10.0, 400.0)}

# name: (neurons of each region, dim, vocab_size, sparse)
SIZES = {
    "tiny": ((128, 256, 128, 256, 64, 256), 128, 256, False),
    "small": ((512, 1024, 512, 1024, 256, 1024), 512, 256, False),
    "base": ((1024, 10240, 5120, 10240, 2560, 10240), 1536, 32000, True),
    "large": ((20480, 204800, 102400, 204800, 51200, 204800), 1536, 32000, True),
}

DRIVES = (
    ("embedding", ("thalamus", "wernicke", "hippocampus", "pfc", "broca")),
    ("thalamus", ("wernicke",)),
    ("wernicke", ("hippocampus", "pfc", "broca")),  # to broca: the arcuate fasciculus
    ("hippocampus", ("pfc",)),
    ("pfc", ("basal_ganglia", "broca")),
)
GATES = (
    ("basal_ganglia", ("broca",)),  # go / no-go
    ("embedding", ("wernicke", "hippocampus", "pfc", "broca")),
)
EXTRA_GATES = (  # of the dense sizes
    ("thalamus", ("wernicke",)),
    ("wernicke", ("hippocampus", "pfc")),
    ("pfc", ("broca",)),
)
RECURRENT = ("thalamus", "wernicke", "hippocampus", "pfc", "broca")
FEEDBACK = (("pfc", "thalamus", 4), ("pfc", "wernicke", 3))  # source, receiver, delay in tokens
READOUT = ("wernicke", "hippocampus", "pfc", "broca")

# Without a bound, half of all trainings of `tiny` end in a loop of spikes that grow without limit.
MAX_SPIKE = 4.0

# Blocks that a row of blocks holds in the sparse sizes.
BLOCKS, RECURRENT_BLOCKS, READOUT_BLOCKS = 1, 2, 8


def preset_fields(name: str, dim: int | None = None) -> dict[str, Any]:
    """Fields of the Config called `name`, with `dim` in place of the preset's own where it is given.

    Raises ValueError when no preset has that name.
    """
    if name not in SIZES:
        raise ValueError(f"preset: expected one of {', '.join(SIZES)}, got {name!r}")
    neurons, preset_dim, vocab_size, sparse = SIZES[name]
    dim = preset_dim if dim is None else dim
    widths = {"embedding": dim, **dict(zip(REGIONS, neurons))}

    def project(src: str, dst: str, delay: int = 0, kind: str = "drive", blocks: int = BLOCKS) -> Projection:
        density = min(1.0, BLOCK * blocks / widths[src]) if sparse else 1.0
        return Projection(src, dst, delay, kind, density)

    gates = GATES if sparse else GATES + EXTRA_GATES
    projections = [project(src, dst) for src, receivers in DRIVES for dst in receivers]
    projections += [project(src, dst, kind="gate") for src, receivers in gates for dst in receivers]
    projections += [project(region, region, 1, blocks=RECURRENT_BLOCKS) for region in RECURRENT]
    projections += [project(src, dst, delay) for src, dst, delay in FEEDBACK]
    projections += [project(region, "broca_out", blocks=READOUT_BLOCKS) for region in READOUT]
    regions = [
        Region(name, widths[name], level, TAU.get(name, Region.tau), TAU_ADAPT.get(name, Region.tau_adapt))
        for level, name in enumerate(REGIONS)
    ]
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "regions": regions,
        "projections": projections,
        "max_spike": MAX_SPIKE,
    }
