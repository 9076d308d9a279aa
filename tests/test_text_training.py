"""Training on tokens of documents, stopped and moved to another place: the very next token, the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import tokenizer_makers as makers

import neurogen_cy as ng
from neurogen_cy import checkpoint
from neurogen_cy.corpus import open_corpus, open_same_corpus
from neurogen_cy.data import default_corpus
from neurogen_cy.streams import TokenStreams, held_out
from neurogen_cy.tokenization import load_saved

B, T = 3, 8


def steps(model: ng.NeuroGen, reader: TokenStreams, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        ids, targets, resets = reader.next()
        losses.append(model.train_step_batch(ids, targets, resets=resets).loss)
    return losses


def test_a_run_on_documents_goes_on_elsewhere(tmp_path: Path) -> None:
    tokenizer = makers.make("byte-level")
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number:02}").write_bytes(default_corpus()[0][number * 300 :][:60])
    corpus = open_corpus(tmp_path / "texts", tokenizer, cache=tmp_path / "cache")
    wiring = (ng.Projection("embedding", "a"), ng.Projection("a", "a", delay=1), ng.Projection("a", "broca_out"))
    config = ng.Config(tokenizer.vocab_size, 32, (ng.Region("a", 64, 0),), wiring)

    def fresh() -> ng.NeuroGen:
        return ng.NeuroGen(config, backend="cpu", streams=B, max_tokens=T, threads=1)

    model, reader = fresh(), TokenStreams(corpus.training, B, T)
    whole = steps(model, reader, 40)
    assert reader.epochs > 1

    model, reader = fresh(), TokenStreams(corpus.training, B, T)
    parts = steps(model, reader, 17)
    model.save(tmp_path / "run", cursor=reader.cursor, extra={"corpus": corpus.facts}, tokenizer=tokenizer)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    shutil.rmtree(tmp_path / "cache")

    meta = checkpoint.read_meta(tmp_path / "moved")
    again = load_saved(tmp_path / "moved")
    found = open_same_corpus(meta["extra"]["corpus"], again, cache=tmp_path / "other cache")
    model, reader = ng.NeuroGen.load(tmp_path / "moved", backend="cpu", threads=1), TokenStreams(found.training, B, T)
    reader.cursor = meta["cursor"]
    assert parts + steps(model, reader, 23) == whole

    ids, targets, resets = held_out(found.validation, 4)
    nats = model.evaluate(ids, targets, resets)
    assert nats != model.evaluate(ids, targets) and resets.sum() > 1
    bits = found.validation.bits_per_byte(nats)
    assert 0 < bits < found.validation.bits_per_byte(np.log(tokenizer.vocab_size)) < 8
    decoder = again.decoder()
    told = "".join(decoder.push(int(ids[0])) for ids in model.generate([again.separator], 20, stop_ids=(again.end,)))
    assert isinstance(told + decoder.finish(), str)
