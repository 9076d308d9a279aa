"""`neurogen tokenizer`: made from text, the same every time, and looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizer_makers as makers
from click.testing import CliRunner

from neurogen_cy import tokenization
from neurogen_cy.cli import main
from neurogen_cy.data import default_corpus
from neurogen_cy.sources import open_source
from neurogen_cy.tokenizer_training import train_bpe


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["tokenizer", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_bytes(default_corpus()[0][:30_000])
    return tmp_path / "text.txt"


def test_a_tokenizer_is_made_and_looked_at(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "tok.json"
    status, said = run("train", "--data", text, "--vocab-size", 400, "--out", out)
    assert status == 0 and f"{out}: 400 tokens, sha256 " in said and "the text comes back byte for byte" in said
    made = tokenization.load(out)
    assert made.vocab_size == 400 and made.end == 0 and made.sha256 in said
    assert made.decode_bytes(made.encode(bytes(range(256)))) == bytes(range(256))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    status, said = run("info", out, "--data", text, "--show", "then the caf\u00e9")
    assert status == 0 and f"{out}: json, 400 tokens, sha256 {made.sha256}" in said
    assert "between documents: token 0, '<|endoftext|>'" in said and "bytes a token" in said
    assert ":' the'" in said and r":b'\xc3'" in said
    assert run("info", "bytes")[1].startswith("bytes: bytes, 256 tokens")


def test_a_text_with_few_pairs_gives_fewer(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("ab ab ab")
    status, said = run("train", "--data", tmp_path / "a", "--vocab-size", 5000, "--out", tmp_path / "t")
    assert status == 0 and "tokens (the text has no more pairs that repeat; asked: 5,000), sha256 " in said


def test_lossy_tokenizers_are_called_so(tmp_path: Path, text: Path) -> None:
    (tmp_path / "t.json").write_bytes(makers.content("word-piece"))
    assert "the text does not come back byte for byte" in run("info", tmp_path / "t.json", "--data", text)[1]


def test_what_is_wrong_is_said(tmp_path: Path, text: Path) -> None:
    for arguments, message in (
        (("train", "--data", text, "--out", text), "expected a new file, got one that exists; --force replaces it"),
        (("train", "--data", tmp_path / "no", "--out", tmp_path / "t"), "expected a text file or a directory"),
        (("train", "--data", text, "--vocab-size", 256, "--out", tmp_path / "t"), "expected vocab_size >= 257"),
        (("train", "--data", text, "--out", tmp_path / "no" / "t"), "expected a folder to write into, got none"),
        (("info", text), "expected a tokenizers JSON file or a SentencePiece model, got neither"),
        (("info", tmp_path / "no"), "expected the file of a tokenizer, got"),
    ):
        status, said = run(*arguments)
        assert status == 2 and message in said.replace("\n", " ")
    assert text.read_bytes() == default_corpus()[0][:30_000]
    (tmp_path / "empty").touch()
    assert "expected text in empty, got none" in run("train", "--data", tmp_path / "empty", "--out", tmp_path / "t")[1]
    assert run("train", "--data", text, "--vocab-size", 300, "--out", text, "--force")[0] == 0


def test_the_same_text_gives_the_same_file_whatever_the_threads(text: Path) -> None:
    """Hash seeds and threads of other processes change nothing."""
    program = (
        "import sys; from neurogen_cy.sources import open_source; "
        "from neurogen_cy.tokenizer_training import train_bpe; print(train_bpe(open_source(sys.argv[1]), 700).sha256)"
    )
    seen = {train_bpe(open_source(text), 700).sha256}
    for threads in ("1", "3"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        result = subprocess.run([sys.executable, "-c", program, text], env=environment, capture_output=True, text=True)
        seen.add(result.stdout.strip())
    assert len(seen) == 1


def test_training_reports_how_far_it_is_and_skips_wrong_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"good \xff text \xc3 good " * 30_000)
    seen: list[int] = []
    made = train_bpe(open_source(tmp_path / "a"), 300, seen.append)
    assert seen == sorted(seen) and seen[-1] == (tmp_path / "a").stat().st_size and len(seen) > 1
    assert "\u0120good" in made._library.get_vocab()
    assert made.decode_bytes(made.encode(b"\xff")) == b"\xff"
