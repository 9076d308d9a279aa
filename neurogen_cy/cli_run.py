"""Runs of `neurogen train`: begun as its options say, or taken up where they stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from neurogen_cy import checkpoint
from neurogen_cy.cli_common import (
    TOKENS,
    checkpoint_in,
    run_checkpoint,
    show_tokenising,
    usage_errors,
)
from neurogen_cy.cli_train_options import SEED, WEIGHT_DECAY, groups_of
from neurogen_cy.config import Config
from neurogen_cy.corpus import Corpus, open_corpus, open_same_corpus
from neurogen_cy.model import NeuroGen
from neurogen_cy.optimizer import AdamW
from neurogen_cy.tokenization import Tokenizer, expect_same, load, load_saved
from neurogen_cy.train import LAST, Trainer, run_facts, settings_of
from neurogen_cy.train_settings import TrainSettings, steps_of

Options = dict[str, Any]

CHANGEABLE = (
    "steps", "max_tokens", "max_minutes", "evaluate_every", "patience", "sample_every", "save_every", "save_minutes",
    "keep",
)  # fmt: skip
"""Settings that a resumed run may change."""


@dataclass
class Run:
    """A run ready to go: its trainer, what it is called and its corpus."""

    trainer: Trainer
    name: str
    corpus: Corpus

    @property
    def text(self) -> tuple[bytes, bytes] | None:
        """Text to count n-grams on, and what of the validation text the model is measured on; None for a large one."""
        text = self.corpus.text()
        return None if text is None else (text[0], text[1][: self.trainer.evaluated.text_bytes])


def begin(options: Options) -> Run:
    """Return a new run as the options say."""
    tokenizer = load(options["tokenizer"])
    name, config = _config(options, tokenizer)
    out = options["out"] or Path("runs", name)
    if run_checkpoint(out, LAST) is not None:
        raise ValueError(
            f"{out}: expected a folder without a run, got one with a checkpoint: "
            f"continue it with --resume auto, or name another with --out"
        )
    groups, streams = groups_of(options["accumulate"], options["streams"])
    tokens = options["tokens"] or TOKENS
    settings = _new_settings(options, groups * streams * tokens)
    corpus = open_corpus(
        options["data"], tokenizer, validation=options["validation"], field=options["field"] or "text",
        progress=show_tokenising(),
    )
    decay, clip = options["weight_decay"], options["clip"]
    optimizer = AdamW(
        lr=settings.lr, weight_decay=WEIGHT_DECAY if decay is None else decay, clip=AdamW.clip if clip is None else clip
    )
    with usage_errors(RuntimeError, MemoryError):
        model = NeuroGen(
            config, streams=streams, max_tokens=tokens, seed=options["seed"] or SEED, optimizer=optimizer,
            nonfinite=options["nonfinite"] or "raise", accumulate=groups, **options["run_on"],
        )
    about = {"name": name, "corpus": corpus.facts}
    trainer = Trainer(model, corpus.training, corpus.validation, settings, out, about, tokenizer=tokenizer)
    return Run(trainer, name, corpus)


def resume(options: Options) -> Run | None:
    """Return the run to continue, None where none is asked for or there is none yet."""
    if options["resume"] is None:
        return None
    saved, out = _where(options)
    if saved is None:
        click.echo(f"{out}: no checkpoint yet, a new run begins")
        return None
    meta = checkpoint.read_meta(saved)
    run, about = run_facts(meta, saved), meta["extra"]
    _check_unchanged(options, run, meta, saved)
    groups, streams = groups_of(options["accumulate"], options["streams"], run["streams"] * run["accumulate"])
    settings = _changed_settings(options, run, groups * streams * run["tokens"])
    tokenizer = load_saved(saved)
    if options["tokenizer"] is not None:
        expect_same(load(options["tokenizer"]), tokenizer)
    corpus = open_same_corpus(
        about["corpus"], tokenizer, spec=options["data"], validation=options["validation"], progress=show_tokenising()
    )
    chosen = {} if options["nonfinite"] is None else {"nonfinite": options["nonfinite"]}
    with usage_errors(RuntimeError, MemoryError):
        model = NeuroGen.load(
            saved, streams=streams, max_tokens=run["tokens"], accumulate=groups, **chosen, **options["run_on"]
        )
    if (options["preset"] or options["config"]) and _config(options, tokenizer)[1] != model.config:
        given = "--config" if options["config"] else "--preset"
        raise ValueError(f"{given}: expected the connectome {about['name']} of {saved}, got another one")
    facts = {"name": about["name"], "corpus": corpus.facts}
    trainer = Trainer(model, corpus.training, corpus.validation, settings, out, facts, tokenizer=tokenizer)
    trainer.restore(saved)
    return Run(trainer, about["name"], corpus)


def _where(options: Options) -> tuple[Path | None, Path]:
    """Return the checkpoint to continue from, None where `auto` finds none, and the folder of the run."""
    out: Path | None = options["out"]
    if options["resume"] == "auto":
        named = options["config"].stem if options["config"] else options["preset"] or "tiny"
        out = out or Path("runs", named)
        return run_checkpoint(out, LAST), out
    saved = checkpoint_in(Path(options["resume"]), LAST)
    home = Path(os.path.abspath(saved)).parent
    out = out or home
    if run_checkpoint(out, LAST) is not None and not out.samefile(home):
        raise ValueError(f"{out}: expected the folder of {saved} or one without a run, got another run's")
    return saved, out


def _check_unchanged(options: Options, run: Mapping[str, Any], meta: Mapping[str, Any], saved: Path) -> None:
    """Raise where an option asks for another value than the run has and keeps."""
    former = {**meta["optimizer"], **run, "dropout": meta["config"]["dropout"]}
    for key in ("tokens", "lr", "warmup", "seed", "dropout", "weight_decay", "clip"):
        if options[key] is not None and options[key] != former[key]:
            option = key.replace("_", "-")
            raise ValueError(f"--{option}: expected {former[key]}, as in {saved}, got {options[key]}")


def _new_settings(options: Options, tokens_a_step: int) -> TrainSettings:
    steps, budget = options["steps"], options["max_tokens"]
    if budget is not None:
        steps = min(steps or steps_of(budget, tokens_a_step), steps_of(budget, tokens_a_step))
    steps = steps or TrainSettings.steps
    given = {f.name: options[f.name] for f in fields(TrainSettings) if options.get(f.name) is not None}
    usual = {
        "warmup": min(TrainSettings.warmup, steps // 10),
        "evaluate_every": max(1, min(TrainSettings.evaluate_every, steps // 10)),
    }
    return TrainSettings(**{**usual, **given, "steps": steps})


def _changed_settings(options: Options, run: Mapping[str, Any], tokens_a_step: int) -> TrainSettings:
    changed = {key: options[key] for key in CHANGEABLE if options[key] is not None}
    if "max_tokens" in changed:
        changed["steps"] = options["steps"] or steps_of(changed["max_tokens"], tokens_a_step)
    elif "steps" in changed:
        changed["max_tokens"] = None  # a new total takes the place of the old budget
    return settings_of(run, **changed)


def _config(options: Options, tokenizer: Tokenizer) -> tuple[str, Config]:
    """Return the connectome that is asked for and what to call it."""
    path, preset, vocabulary = options["config"], options["preset"], tokenizer.vocab_size
    dropped = {} if options["dropout"] is None else {"dropout": options["dropout"]}
    if path is None:
        return preset or "tiny", Config.preset(preset or "tiny", vocab_size=vocabulary, **dropped)
    if preset is not None:
        raise ValueError("expected --config or --preset, got both")
    try:
        config = Config.from_toml(path)
        config = Config.from_dict({**config.to_dict(), **dropped})
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if config.vocab_size != vocabulary:
        each = "one for each byte" if tokenizer.kind == "bytes" else "as many as the tokenizer has"
        raise ValueError(f"--config {path}: expected vocab_size {vocabulary}, {each}, got {config.vocab_size}")
    return path.stem, config
