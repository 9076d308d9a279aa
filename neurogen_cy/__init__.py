"""neurogen_cy: spiking brain language models, trained by batched e-prop in native code."""

import os as _os

# Before libgomp loads: a thread that waits for another gives its core away after about 10 us instead of milliseconds.
# Beside one other busy process on two cores, a step of `tiny` took 94 ms instead of 128.
_os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from neurogen_cy import plots
from neurogen_cy._cpu import Brain, Decoder, TokenEmbedding
from neurogen_cy._version import __version__
from neurogen_cy.callbacks import Callback
from neurogen_cy.checkpoint import CheckpointError
from neurogen_cy.config import Config, Projection, Region
from neurogen_cy.corpus import open_corpus
from neurogen_cy.model import NeuroGen
from neurogen_cy.optimizer import AdamW
from neurogen_cy.recorder import Recording
from neurogen_cy.results import StepResult
from neurogen_cy.sizes import memory_plan
from neurogen_cy.train import Trainer
from neurogen_cy.train_settings import TrainSettings

__all__ = [
    "AdamW",
    "Brain",
    "Callback",
    "CheckpointError",
    "Config",
    "Decoder",
    "NeuroGen",
    "Projection",
    "Recording",
    "Region",
    "StepResult",
    "TokenEmbedding",
    "TrainSettings",
    "Trainer",
    "__version__",
    "memory_plan",
    "open_corpus",
    "plots",
]
