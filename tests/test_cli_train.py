"""`neurogen train` with a tokenizer, in groups, watched and limited; what it says, leaves and goes on with."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import tokenizers
from command_line import Run, runner_in
from tokenizers import decoders, models, pre_tokenizers, trainers

from neurogen_cy import Config, NeuroGen, Projection, Region, checkpoint, plots
from neurogen_cy.data import default_corpus
from neurogen_cy.metrics import read_metrics

VOCABULARY = 300
END = "<|endoftext|>"

RESUME = ["train", "--no-pictures", "--resume"]
TRAIN = ["train", "--no-pictures", "--data", "text.txt", "--threads", "1"]
TRAIN += ["--steps", "20", "--streams", "4", "--tokens", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, brains of two vocabularies and a tokenizer."""
    out = tmp_path_factory.mktemp("train")
    text = default_corpus()[0]
    (out / "text.txt").write_bytes(text[:6000])
    (out / "other.txt").write_bytes(text[8000:9000])
    ends = (("embedding", "thalamus", 0), ("thalamus", "broca", 0), ("broca", "broca", 1), ("broca", "broca_out", 0))
    for name, vocabulary in (("brain", 256), ("words", VOCABULARY)):
        config = Config(
            vocab_size=vocabulary, dim=32, regions=(Region("thalamus", 32, 0), Region("broca", 32, 1)),
            projections=tuple(Projection(src, dst, delay) for src, dst, delay in ends),
        )  # fmt: skip
        config.to_toml(out / f"{name}.toml")
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet,
                                  show_progress=False)
    library.train_from_iterator([text[:6000].decode()], trainer)
    library.save(str(out / "tok.json"))
    return out


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner_in(folder, monkeypatch)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same trained bits and the same neuron state."""
    names = [f"{group}.safetensors" for group in ("model", "optimizer", "state")]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_tokenizer_goes_with_the_checkpoint(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tokenizer = tmp_path / "tok.json"
    tokenizer.write_bytes(Path("tok.json").read_bytes())
    train = [*TRAIN, "--config", "words.toml", "--tokenizer", tokenizer, "--out"]
    output = run(*train, out).output
    assert re.search(r"tokens      json, 300 of them; [\d,]+ to train, \d\.\d\d bytes each\n", output)
    assert re.search(r"\nper token: \d\.\d{4} nats, perplexity [\d.]+ \(\d\.\d\d bytes a token", output)
    assert "400 tokens of its own" in output
    tokenizer.unlink()
    facts = json.loads(run("eval", out, "--json", "--threads", 1).output)
    record = [r for r in read_metrics(out / "metrics.jsonl") if r["event"] == "evaluation"][-1]
    assert facts["nats_per_token"] == pytest.approx(record["validation_loss"], rel=1e-6)
    assert facts["bits_per_byte"] == pytest.approx(record["validation_bits_per_byte"], rel=1e-6)
    assert facts["perplexity_per_token"] == pytest.approx(math.exp(facts["nats_per_token"]))
    text = Path("text.txt").read_bytes()[5400:]
    tokens = len(tokenizers.Tokenizer.from_file("tok.json").encode(text.decode()).ids)
    assert facts["bits_per_byte"] == pytest.approx(facts["nats_per_token"] / math.log(2) * tokens / 600, rel=0.01)
    line = json.loads(run("generate", out, "--prompt", "The \u00e9", "--tokens", 20, "--json", "--seed", 1).output)
    assert line["text"] and line["tokens"] <= 20
    assert "words" in run("eval", out, "--all").output and "3-gram" in run("eval", out, "--ngrams").output
    run(*RESUME, out, "--steps", 22)
    assert "expected the tokenizer of the checkpoint" in run(
        "train", "--resume", out, "--steps", 24, "--tokenizer", "bytes", status=2
    ).output
    message = "words.toml: expected vocab_size 256, one for each byte, got 300"
    assert message in run(*TRAIN, "--config", "words.toml", "--out", tmp_path / "no", status=2).output


def test_a_run_in_groups_stops_and_resumes_bit_for_bit(run: Run, tmp_path: Path) -> None:
    train = [*TRAIN[:-4], "--tokens", 8, "--config", "brain.toml", "--dropout", 0.1, "--accumulate", "2x2", "--seed", 1]
    assert "2 x 2 streams x 8 tokens a step" in run(*train, "--out", tmp_path / "whole").output
    run(*train, "--out", tmp_path / "broken", "--max-minutes", 1e-9)
    assert checkpoint.read_meta(tmp_path / "broken/last")["step"] == 1
    again = [*RESUME, tmp_path / "broken", "--threads", 2]
    assert "1e-09 minutes are over" in run(*again, "--max-minutes", 1e-9, "--accumulate", 2).output
    output = run(*again, "--accumulate", 2).output
    assert "steps 2 to 20" in output and "minutes are over" not in output
    assert same_weights(tmp_path / "whole/last", tmp_path / "broken/last")
    assert same_weights(tmp_path / "whole/best", tmp_path / "broken/best")


def test_a_run_goes_on_in_other_groups(run: Run, tmp_path: Path) -> None:
    train = [*TRAIN, "--config", "brain.toml", "--out", tmp_path]
    run(*train, "--max-tokens", 10 * 32)
    assert checkpoint.read_meta(tmp_path / "last")["step"] == 10
    assert "steps 10 to 15" in run(*RESUME, tmp_path, "--accumulate", 4, "--max-tokens", 15 * 32).output
    assert "4 x 1 streams" in run(*RESUME, tmp_path, "--accumulate", 4, "--steps", 16).output
    output = run(*RESUME, tmp_path, "--steps", 18).output
    assert ", 4 streams x 8 tokens a step" in output
    steps = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["event"] == "step"]
    assert [record["tokens"] for record in steps] == [32 * step for step in range(1, 19)]
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_options_reach_the_model(run: Run, tmp_path: Path) -> None:
    chosen = ["--weight-decay", 0.25, "--clip", 0.5, "--dropout", 0.125, "--lr", 0.01, "--warmup", 3, "--seed", 9]
    run(*TRAIN, "--config", "brain.toml", "--out", tmp_path, "--nonfinite", "skip", *chosen, "--evaluate-every", 7)
    meta = checkpoint.read_meta(tmp_path / "last")
    assert (meta["optimizer"]["weight_decay"], meta["optimizer"]["clip"], meta["seed"]) == (0.25, 0.5, 9)
    assert (meta["config"]["dropout"], meta["nonfinite"]) == (0.125, "skip")
    run_facts = meta["extra"]["run"]
    assert (run_facts["lr"], run_facts["warmup"], run_facts["evaluate_every"]) == (0.01, 3, 7)
    evaluations = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["event"] == "evaluation"]
    assert evaluations == [7, 14, 20]


def test_early_stop_says_so_and_shows_the_best(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([5.0, 4.0, 4.5, 4.25])
    monkeypatch.setattr(NeuroGen, "evaluate", lambda *arguments: next(losses))
    train = [*TRAIN, "--config", "brain.toml", "--out", tmp_path / "run", "--patience", 2, "--keep", 2]
    output = run(*train, "--save-every", 2).output
    assert "stopped (no better validation in 2 evaluations) at step 8 of 20, saved in" in output
    rows = re.findall(r"\n(brain, step \d+(?:, the best)?) +(\d\.\d{4})", output)
    assert rows[0][0] == "brain, step 4, the best" and float(rows[0][1]) == pytest.approx(4 / math.log(2), abs=1e-4)
    assert rows[1][0] == "brain, step 8" and "to continue" not in output
    names = ["best", "last", "metrics.jsonl", "step-000006", "step-000008"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    assert "stopped (no better" in run(*RESUME, tmp_path / "run").output
    losses = iter([3.0, 2.0, 2.5, 2.5, 2.5])
    assert "step 12, the best" in run(*RESUME, tmp_path / "run", "--patience", 3).output


def test_samples_and_tensorboard(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    train = [*TRAIN, "--config", "brain.toml", "--out", tmp_path, "--sample-every", 10, "--tensorboard"]
    output = run(*train).output
    samples = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["event"] == "sample"]
    assert [sample["step"] for sample in samples] == [10, 20] and samples[0]["prompt"] in output
    assert f"step 10 writes: {samples[0]['prompt']}|" in output
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_validation_text_of_its_own(run: Run, tmp_path: Path) -> None:
    train = [*TRAIN, "--config", "brain.toml", "--validation", "other.txt", "--out", tmp_path]
    assert "all of it to train, the 1,000 bytes of other.txt to validate" in run(*train).output
    assert "992 bytes predicted" in run("eval", tmp_path).output
    assert "5,984 bytes predicted" in run("eval", tmp_path, "--all").output
    assert "steps 20 to 21" in run(*RESUME, tmp_path, "--steps", 21).output


def test_pictures_at_the_end(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ["train", *TRAIN[2:], "--config", "brain.toml", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(plots, "unavailable", lambda: "no pictures without it")
        assert run(*train, tmp_path / "without").stdout.endswith("no pictures without it\n")
    pytest.importorskip("matplotlib")
    output = run(*train, tmp_path / "run").stdout
    assert output.endswith(f"pictures: {tmp_path / 'run' / 'pictures'}\n")
    pictures = {path.name for path in (tmp_path / "run/pictures").iterdir()}
    assert {"curves.png", "raster.svg"} <= pictures
    monkeypatch.setattr(plots, "run_pictures", lambda *arguments, **options: open(tmp_path / "absent" / "file"))
    output = run("train", "--resume", tmp_path / "run", "--steps", 21).stdout
    assert "no pictures: [Errno 2] No such file or directory" in output and "neurogen generate" in output
