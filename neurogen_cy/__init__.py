"""neurogen_cy: spiking brain language models, trained by batched e-prop in native code."""

from neurogen_cy._cpu import Brain, Decoder, TokenEmbedding
from neurogen_cy._version import __version__
from neurogen_cy.checkpoint import CheckpointError
from neurogen_cy.config import Config, Projection, Region
from neurogen_cy.model import NeuroGen, StepResult, memory_plan
from neurogen_cy.optimizer import AdamW

__all__ = [
    "AdamW",
    "Brain",
    "CheckpointError",
    "Config",
    "Decoder",
    "NeuroGen",
    "Projection",
    "Region",
    "StepResult",
    "TokenEmbedding",
    "__version__",
    "memory_plan",
]
