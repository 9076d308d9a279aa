"""NeuroGen: a spiking brain language model, the face of the native backends."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy import backend as backends
from neurogen_cy import evaluation, generation, persistence, profiling, recorder, token_loop
from neurogen_cy.config import Config
from neurogen_cy.connectome import initial_parameters
from neurogen_cy.optimizer import AdamW
from neurogen_cy.recorder import Recording
from neurogen_cy.results import StepResult
from neurogen_cy.sizes import check_memory, integer, model_sizes
from neurogen_cy.tokenization import Tokenizer

FLOAT_MAX = float(np.finfo(np.float32).max)


def _choice(name: str, value: Any, *choices: Any) -> Any:
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(repr(choice) for choice in choices)}, got {value!r}")
    return value


class NeuroGen:
    """A spiking brain language model: token embedding, cortical regions, Broca's area, vocabulary decoder.

    Learns by batched e-prop (Bellec et al. 2020, with exact spatial credit): one call trains on B streams of T
    tokens, state carries over from call to call, memory depends on T and never on the length of the text.

    Parameters
    ----------
    config : Config
    backend : {"auto", "cpu", "cuda"}
        "auto" takes the GPU where it can be used; "cuda" says why where it cannot.
    device : int
        CUDA device; must be 0 on the CPU.
    streams : int
        B, independent text streams of one call.
    max_tokens : int
        Largest T of one call.
    seed : int in 0..2**64-1
        Draws the initial values, keys dropout, and is the default of sampling.
    precision : {None, "bf16", "fp32", "fp8"}
        Of products: of bfloat16 values, summed in float32 (CUDA only, and its default), or of float32. "fp8" is bf16
        but for the vocabulary decoder where a call learns: there activations and weights are e4m3 and the errors of
        logits e5m2, numbers of 8 bits, each array with one scale (CUDA, compute capability 8.9 or newer; for large
        batches). Weights, moments and neuron state are float32 always.
    threads : int or None
        CPU threads; None = every core this process may use.
    optimizer : AdamW or None
    sync : {"block", "spin"}
        How the host waits for a device: asleep, or spinning on a core. The CPU has nothing to wait for.
    nonfinite : {"raise", "skip"}
        What a non-finite loss or gradient norm does: FloatingPointError, or a skipped (and counted) step. Weights,
        moments and neuron state stay as they were either way.
    accumulate : int
        Calls of `backward_batch` that make one optimizer step. Each adds the homeostasis term by 1 / accumulate, so
        that all of them weigh as much as one call; with `divisor` the cross-entropy does.

    Attributes
    ----------
    embedding, brain, decoder : TokenEmbedding, Brain, Decoder
    step : int
        Optimizer steps done.
    skipped : int
        Training calls that `nonfinite="skip"` skipped.
    """

    def __init__(
        self,
        config: Config,
        backend: str = "auto",
        device: int = 0,
        streams: int = 1,
        max_tokens: int = 128,
        seed: int = 0,
        precision: str | None = None,
        threads: int | None = None,
        optimizer: AdamW | None = None,
        sync: str = "block",
        nonfinite: str = "raise",
        accumulate: int = 1,
        *,
        _parameters: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        if not isinstance(config, Config):
            raise TypeError(f"config: expected a neurogen_cy.Config, got {type(config).__name__}")
        if optimizer is not None and not isinstance(optimizer, AdamW):
            raise TypeError(f"optimizer: expected a neurogen_cy.AdamW, got {type(optimizer).__name__}")
        self.backend, self._module = backends.load(backend)
        self.config = config
        self.device = integer("device", device, least=0)
        self.streams, self.max_tokens, self.threads = model_sizes(streams, max_tokens, threads)
        self.precision = backends.precision(self._module, precision)
        self.optimizer = AdamW() if optimizer is None else optimizer
        self.sync = _choice("sync", sync, "block", "spin")
        self.nonfinite = _choice("nonfinite", nonfinite, "raise", "skip")
        self.accumulate = integer("accumulate", accumulate)
        check_memory(
            self._module, config, self.streams, self.max_tokens, self.threads, self.device, self.precision
        )
        values = initial_parameters(config, seed) if _parameters is None else dict(_parameters)
        self.seed = int(seed)
        topology = {
            key[: -len(".cols")]: np.ascontiguousarray(values.pop(key)) for key in list(values) if key.endswith(".cols")
        }
        values = {key: value for key, value in values.items() if not key.endswith(".rows")}
        part = replace(config, rate_weight=config.rate_weight / self.accumulate)
        self._engine = self._module.Engine(
            part, topology, self.streams, self.max_tokens, self.threads, self.seed, self.device, self.precision,
            self.sync,
        )
        self._engine.load_parameters(values)
        self._views = self._engine.parameters()
        self.embedding = self._module.TokenEmbedding(self._engine)
        self.brain = self._module.Brain(self._engine)
        self.decoder = self._module.Decoder(self._engine)
        self.step = 0
        self.calls = 0  # training calls made; keys dropout
        self.skipped = 0
        self._trainings = self._trained_tokens = 0  # for `profile`
        self._token_buffers = token_loop.Buffers(self.streams, config.dim)
        self._lock = threading.Lock()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps a second thread out of a call and of the counters that go with it."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this model is in use by another thread: a model serves one thread at a time")
        try:
            yield
        finally:
            self._lock.release()

    # ---- learning ----------------------------------------------------------------------------------------------

    def train_step_batch(
        self,
        ids: Any,
        targets: Any,
        weights: Any = None,
        resets: Any = None,
        *,
        normalize: str = "sum",
        lr: float | None = None,
        predictions_out: Any = None,
        record: bool = False,
        stream: Any = None,
    ) -> StepResult:
        """One optimizer step on B streams of T tokens, in one native call.

        Parameters
        ----------
        ids, targets : int32 or int64 array [B, T], or [T] if B = 1
            What is heard, and what should have been said next; 1 <= T <= max_tokens.
        weights : float32 array like ids, optional
            Weight of each token's loss, 1 by default; 0 masks. A reward signal is a weight.
        resets : bool or uint8 array like ids, optional
            True clears that stream's state before the token (a document starts).
        normalize : {"sum", "abs"}
            Divide by the sum of weights (which must not be negative), or of their magnitudes.
        lr : float, optional
            Learning rate of this step instead of the optimizer's.
        predictions_out : int32 array like ids, optional
            Gets the most probable token at every position.
        record : bool
            Keep membrane and spikes of this call for `recorded`.
        stream : int or stream object, optional
            The stream that works on device arrays, where it is not the one they name, or the default one.

        On a GPU all arrays may be device arrays (docs/INTEROP.md). Their values are checked where they are read, so a
        wrong one raises when the call ends, and changes nothing either. With host arrays the call returns as soon as
        its result is decided, while the update goes on; whatever is asked of the model next comes after it.

        Raises
        ------
        TypeError, ValueError, IndexError
            The message names the argument, expected and got; nothing was touched.
        FloatingPointError
            With nonfinite="raise", when the loss or the gradient norm is not finite.
        """
        with self._alone():
            return self._train(
                ids, targets, weights, resets, normalize, None, predictions_out, record, self._update(lr), False,
                stream,
            )

    def backward_batch(
        self,
        ids: Any,
        targets: Any,
        weights: Any = None,
        resets: Any = None,
        *,
        normalize: str = "sum",
        accumulate: bool = False,
        divisor: float | None = None,
        predictions_out: Any = None,
        record: bool = False,
        stream: Any = None,
    ) -> StepResult:
        """`train_step_batch` without the update: advances state and fills `gradients()`.

        `accumulate` adds to the gradients instead of overwriting them; `divisor` (>= 0) replaces the sum of weights,
        so that parts of a batch add up to the whole. The homeostasis term is of this call's own rates.
        """
        with self._alone():
            return self._train(
                ids, targets, weights, resets, normalize, divisor, predictions_out, record, None, bool(accumulate),
                stream,
            )

    def optimizer_step(self, lr: float | None = None, *, stream: Any = None) -> float:
        """AdamW on the gradients as they stand; returns their norm before clipping. They are not cleared.

        `stream` is where they were last written through device views, if it is not the default stream.
        """
        with self._alone():
            norm, finite = self._engine.update(self._update(lr), stream)
            self._guard(finite, f"gradient norm {norm}")
            self.step += bool(finite)
            return float(norm)

    def _update(self, lr: float | None = None) -> tuple[float, float, float, float, float, float, int]:
        """What the native code takes of the next update."""
        if lr is not None and (isinstance(lr, bool) or not isinstance(lr, Real)):
            raise TypeError(f"lr: expected a number, got {lr!r}")
        arguments = self.optimizer.arguments(self.step + 1, lr)
        if arguments[0] > FLOAT_MAX * (1 - self.optimizer.betas[0]):
            raise ValueError(f"lr: expected a step size within float32, got {arguments[0]!r}")
        return arguments

    def train_step(self, ids: Any, targets: Any, *, copies: bool = True) -> StepResult:
        """The user's loop, token by token: a decision on the host and an update for every single token.

        Kept to be measured against `train_step_batch`; it learns, with T = 1 (no credit through time). Dropout is
        not applied. Every token is an update of its own: a non-finite one keeps those before it. With `copies` the
        embedding, Broca's output and the word said are new arrays for every token; without, they are written into
        arrays that the model keeps for it, and the same bits are learnt.
        """
        return token_loop.train_step(self, ids, targets, token_loop.COPIES if copies else token_loop.BUFFERS)

    def _train(
        self, ids: Any, targets: Any, weights: Any, resets: Any, normalize: str, divisor: float | None,
        predictions_out: Any, record: bool, adam: tuple[Any, ...] | None, accumulate: bool, stream: Any,
    ) -> StepResult:
        result, finite = self._result(self._engine.train(
            ids, targets, weights, resets, normalize, divisor, predictions_out, record, self.calls, adam, accumulate,
            stream,
        ))
        if adam is None:
            result = replace(result, grad_norm=None)
        self._guard(finite, f"loss {result.loss}, gradient norm {result.grad_norm}")
        self.calls += finite
        self.step += finite and adam is not None
        return result if predictions_out is None else replace(result, predictions=predictions_out)

    def _result(self, statistics: tuple[Any, ...]) -> tuple[StepResult, bool]:
        loss, homeostasis, correct, tokens, grad_norm, finite, rates = statistics
        self._trainings += 1
        self._trained_tokens += tokens
        names = (region.name for region in self.config.regions)
        result = StepResult(loss, homeostasis, correct / tokens if tokens else 0.0, tokens, grad_norm,
                            dict(zip(names, rates)))
        return result, bool(finite)

    def _guard(self, finite: bool, what: str) -> None:
        if finite:
            return
        if self.nonfinite == "raise":
            raise FloatingPointError(
                f"step {self.step + 1}: expected a finite loss, gradient and neuron state, got {what}; weights, "
                "moments and neuron state are unchanged"
            )
        self.skipped += 1

    # ---- running -----------------------------------------------------------------------------------------------

    def evaluate(self, ids: Any, targets: Any, resets: Any = None) -> float:
        """Mean cross-entropy in nats per token, over streams of any number and length, each from zero state.

        Parameters
        ----------
        ids, targets : int32 or int64 array [S, L] (or [L]), of any strides
        resets : bool or uint8 array like ids, optional

        The model's own state is not touched.
        """
        return evaluation.evaluate(self, ids, targets, resets)

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
        carry: bool = False,
    ) -> Iterator[NDArray[np.int32]]:
        """Continue prompts; yields the next token of every stream, int32 [S], until all have stopped.

        Parameters
        ----------
        prompts : list of 1-D integer arrays or lists, or one array: [T] a single prompt, [S, T] one a row
            Of any lengths >= 1; S of them side by side.
        max_new_tokens : int
        temperature, top_k, top_p, greedy
            See `Decoder.sample_into`.
        seed : int, optional
            The same seed continues the same way; the model's own by default.
        stop_ids : ids after which a stream yields -1
        carry : bool
            Continue from the model's own state instead of zero (a conversation; S = B). With every yield that
            state has heard the prompts and all tokens yielded so far, of each stream up to its stop id.
        """
        return generation.generate(
            self, prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy, seed=seed,
            stop_ids=stop_ids, carry=carry,
        )

    # ---- looking -----------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Any]:
        """{key: read-only zero-copy view} of every model tensor, constants and block coordinates too."""
        return dict(self._views)

    def load_parameters(self, values: Mapping[str, Any]) -> None:
        """Overwrite float32 parameters by key (any of them); nothing changes unless all of them fit."""
        self._engine.load_parameters(values)

    def gradients(self) -> dict[str, Any]:
        """{key: writable zero-copy view} of every trainable tensor's gradient, the embedding's dense.

        Whoever writes into device memory on another stream than the default one names it in the next call (`stream`).
        """
        return dict(self._engine.gradients())

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Neuron state as arrays: region.<name>.v, .w [B, n], .spikes [B, K, n] (newest first), broca.o [B, D]."""
        return dict(self._engine.own_state().arrays())

    def load_state(self, values: Mapping[str, Any]) -> None:
        """Put a state back that `state` gave; nothing changes unless every array fits."""
        self._engine.own_state().load(values)

    def recorded(self, region: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """u (distance to threshold) and s (spikes), [B, T, n] each, of the last call, made with record=True."""
        names = [known.name for known in self.config.regions]
        if region not in names:
            raise ValueError(f"region: expected one of {', '.join(names)}, got {region!r}")
        u, s, _ = self._engine.recorded(names.index(region))
        return u, s

    def record(self, ids: Any, state: Mapping[str, Any] | None = None) -> Recording:
        """Hear a text and keep what every neuron did: membrane, spikes and gates of every region and token.

        Parameters
        ----------
        ids : int32 or int64 array [S, L] (or [L]), of any length
        state : mapping, optional
            Where to begin, as from `state()`; from zero by default. S is then the model's number of streams.

        The model's own state is not touched, nothing is learnt, dropout is off. Takes no launch and no synchronisation
        that hearing the text without a record would not take; the copies are made after each call of `max_tokens`.
        """
        with self._alone():
            return recorder.record(self, ids, state)

    @property
    def counters(self) -> dict[str, int]:
        """Launches, synchronisations, bytes copied each way and allocations of the native library so far."""
        return dict(self._engine.counters())

    def profile(self) -> AbstractContextManager[profiling.Profile]:
        """Measure a stretch of your own program: `with model.profile() as p: ...`, then `print(p)`.

        Gives what `counters` grew by, wall time, CPU time, and training calls with their tokens: a `profiling.Profile`.
        """
        return profiling.profile(self)

    @property
    def execution_plan(self) -> dict[str, str]:
        """How this model runs on this machine, for people: name and value."""
        return dict(self._engine.execution_plan())

    # ---- keeping -----------------------------------------------------------------------------------------------

    def save(
        self, directory: str | os.PathLike[str], cursor: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None, tokenizer: Tokenizer | None = None,
        state: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        """Write a checkpoint directory: weights, moments, neuron state, config, step and what the caller adds.

        `cursor` (where the data stream stands) and `extra` are JSON-able and come back in `meta.json`; `tokenizer` is
        kept with its file, and `tokenization.load_saved` gives it back wherever the checkpoint is moved to. `state`
        is kept instead of the model's own, of any number of streams.
        """
        persistence.save(self, directory, cursor, extra, tokenizer, state)

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], backend: str = "auto", device: int = 0, streams: int | None = None,
        max_tokens: int | None = None, **settings: Any,
    ) -> NeuroGen:
        """The model of a checkpoint, ready to go on exactly where it stopped.

        With another number of streams the neuron state starts from zero. `settings` are those of the constructor
        that a checkpoint does not fix: precision, threads, sync, nonfinite, optimizer, accumulate. A checkpoint written
        on one backend goes on on the other.
        """
        return persistence.load(cls, directory, backend, device, streams, max_tokens, settings)
