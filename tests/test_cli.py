"""The command line, from a text to a checkpoint and a sample."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import Run, runner_in

import neurogen_cy
from neurogen_cy import Config, Projection, Region, __version__, checkpoint
from neurogen_cy.cli import main
from neurogen_cy.data import default_corpus
from neurogen_cy.metrics import read_metrics


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `brain.toml`, `text.txt` and a finished run in `runs/brain`."""
    folder = tmp_path_factory.mktemp("cli")
    regions = (Region("thalamus", 32, 0), Region("broca", 32, 1))
    ends = (
        ("embedding", "thalamus", 0),
        ("thalamus", "broca", 0),
        ("broca", "broca", 1),
        ("broca", "broca_out", 0),
    )
    projections = tuple(Projection(src, dst, delay) for src, dst, delay in ends)
    Config(vocab_size=256, dim=32, regions=regions, projections=projections).to_toml(folder / "brain.toml")
    (folder / "text.txt").write_bytes(default_corpus()[0][:4000])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(main, [*TRAIN, "--seed", "3"])
    assert result.exit_code == 0, result.output
    (folder / "output.txt").write_text(result.output)
    return folder


RESUME = ["train", "--no-pictures", "--resume"]
TRAIN = ["train", "--no-pictures", "--data", "text.txt", "--config", "brain.toml", "--threads", "1"]
TRAIN += ["--steps", "20", "--streams", "2", "--tokens", "16"]


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner_in(files, monkeypatch)


def test_train_says_what_it_reads_and_what_came_of_it(files: Path) -> None:
    output = (files / "output.txt").read_text()
    assert f"text.txt ({files / 'text.txt'})" in output and "4,000 bytes, sha256 " in output
    assert "the first 3,600 bytes to train, the last 400 to validate" in output
    assert re.search(r"baselines +3-gram \d\.\d+, 4-gram \d\.\d+, 5-gram \d\.\d+ bits per byte", output)
    assert re.search(r"\nbrain, step 20 +\d\.\d{4} +\d\.\d{4} +\d+\.\d{3}\n", output)
    assert len(re.findall(r"\n[345]-gram \(Witten-Bell\) ", output)) == 3
    assert re.search(r"sample: \d+ bytes of the validation text \| 400 bytes of its own\n\n.{40,}\|", output)
    assert "checkpoints: runs/brain/last, runs/brain/best" in output
    assert sorted(path.name for path in (files / "runs/brain").iterdir()) == ["best", "last", "metrics.jsonl"]
    assert "20/20" in output and "tokens/s" in output and "firing" in output


def test_the_same_command_gives_the_same_weights(run: Run, tmp_path: Path) -> None:
    run(*TRAIN, "--seed", 3, "--out", tmp_path)
    one, other = (out / "last/model.safetensors" for out in (Path("runs/brain"), tmp_path))
    assert one.read_bytes() == other.read_bytes()
    run(*TRAIN, "--seed", 4, "--out", tmp_path / "other")
    assert one.read_bytes() != (tmp_path / "other/last/model.safetensors").read_bytes()


def test_resuming_a_finished_run_says_so(run: Run) -> None:
    metrics = Path("runs/brain/metrics.jsonl").read_bytes()
    for resume in ("auto", "runs/brain", "runs/brain/last"):
        result = run(*RESUME, resume, *(["--out", "runs/brain"] if resume == "auto" else []))
        assert "finished, 20 of 20 steps are done" in result.output
    assert "finished" in run(*TRAIN, "--resume", "auto").output
    assert Path("runs/brain/metrics.jsonl").read_bytes() == metrics


def test_resume_auto_begins_where_nothing_is_and_more_steps_go_on(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new"
    assert (
        f"{out}: no checkpoint yet, a new run begins" in run(*TRAIN, "--resume", "auto", "--out", out).output
    )
    assert "steps 20 to 25" in run(*RESUME, out, "--steps", 25, "--save-every", 3).output
    steps = [record["step"] for record in read_metrics(out / "metrics.jsonl") if record["event"] == "step"]
    assert steps == list(range(1, 26))


def test_resume_into_another_folder_leaves_the_first_alone(run: Run, tmp_path: Path) -> None:
    before = Path("runs/brain/last/meta.json").read_bytes()
    run(*RESUME, "runs/brain", "--steps", 22, "--out", tmp_path / "branch")
    assert Path("runs/brain/last/meta.json").read_bytes() == before
    assert [r["step"] for r in read_metrics(tmp_path / "branch/metrics.jsonl") if r["event"] == "step"] == [
        21,
        22,
    ]
    message = "expected the folder of runs/brain/last or one without a run, got another run's"
    assert message in run(*RESUME, "runs/brain", "--out", tmp_path / "branch", status=2).output


def test_resume_keeps_the_settings(run: Run, tmp_path: Path) -> None:
    out = ("--resume", "auto", "--out", "runs/brain")
    for option, value, former in (
        ("--tokens", 8, 16),
        ("--lr", 0.1, 0.004),
        ("--seed", 4, 3),
        ("--warmup", 5, 2),
        ("--dropout", 0.5, 0.0),
        ("--weight-decay", 0.1, 0.5),
        ("--clip", 0.1, 1.0),
    ):
        result = run("train", *out, option, value, status=2)
        assert f"{option}: expected {former}, as in runs/brain/last, got {value}" in result.output
    for grouping in (["--streams", 3], ["--accumulate", 3], ["--accumulate", "2x2"]):
        assert "expected 2 streams in all, as the run has" in run("train", *out, *grouping, status=2).output
    assert (
        "--preset: expected the connectome brain of runs/brain/last"
        in run("train", *out, "--preset", "tiny", status=2).output
    )
    (tmp_path / "text.txt").write_text("another text " * 99)
    result = run("train", *out, "--data", tmp_path / "text.txt", status=2)
    assert re.search(
        r"expected the text that was trained on \(text.txt, 4000 bytes, sha256 .*, got text.txt, 1287",
        result.output,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "text.txt"], "--resume auto, or name another with --out"),
        (
            ["--data", "absent.txt", "--out", "new"],
            "expected a text file or a directory of text files, got absent.txt",
        ),
        (["--data", "empty", "--out", "new"], "expected text files below empty, got none"),
        (
            ["--data", "text.txt", "--streams", "999", "--out", "new"],
            "streams * tokens + 1 = 999 * 64 + 1 = 63937 bytes",
        ),
        (["--lr", "-1", "--out", "new"], "expected a finite lr > 0, got -1.0"),
        (["--lr", "fast", "--out", "new"], "'fast' is not a valid float"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--preset", "huge"], "'huge' is not one of 'tiny', 'small', 'base', 'large'"),
        (
            ["--preset", "tiny", "--config", "brain.toml", "--out", "new"],
            "expected --config or --preset, got both",
        ),
        (["--config", "absent.toml", "--out", "new"], "absent.toml"),
        (["--config", "text.txt", "--out", "new"], "text.txt"),
        (
            ["--config", "wide.toml", "--out", "new"],
            "wide.toml: expected vocab_size 256, one for each byte, got 300",
        ),
        (["--config", "wrong.toml", "--out", "new"], "got 'many'"),
        (["--resume", "absent"], "absent: expected a checkpoint directory, got no such path"),
        (["--resume", "auto", "--out", "runs/brain/last"], "expected the folder of a run, got a checkpoint"),
        (["--no-such-option"], "No such option"),
        (["--accumulate", "2x"], "expected N or NxB as in 2x32, whole numbers >= 1, got '2x'"),
        (["--accumulate", "2x32", "--streams", "64", "--out", "new"], "as --accumulate 2x32 says it, got 64"),
        (["--max-tokens", "10", "--out", "new"], "expected max_tokens of at least a step, 1024, got 10"),
        (["--tokenizer", "text.txt", "--out", "new"], "text.txt"),
        (["--tokenizer", "absent.json", "--out", "new"], "absent.json"),
        (["--validation", "absent.txt", "--data", "text.txt", "--out", "new"], "absent.txt"),
        (["--clip", "-1", "--out", "new"], "clip: expected a finite number >= 0, got -1.0"),
        (["--dropout", "1", "--out", "new"], "dropout"),
        (["--nonfinite", "hope"], "'hope' is not one of 'raise', 'skip'"),
    ],
)
def test_train_refuses(run: Run, arguments: list[str], message: str) -> None:
    Path("empty").mkdir(exist_ok=True)
    brain = Path("brain.toml").read_text()
    Path("wide.toml").write_text(brain.replace("vocab_size = 256", "vocab_size = 300"))
    Path("wrong.toml").write_text(brain.replace("vocab_size = 256", 'vocab_size = "many"'))
    resumed = "--resume" in arguments or "--preset" in arguments or "--config" in arguments
    extra = [] if resumed else ["--config", "brain.toml"]
    output = run("train", *arguments, *extra, status=2).output
    assert message in re.sub(r"\s+", " ", output)
    assert not Path("new").exists()


def test_a_damaged_checkpoint_is_refused_everywhere(run: Run, tmp_path: Path) -> None:
    run(*TRAIN, "--out", tmp_path)
    for name in ("last", "best"):
        path = tmp_path / name / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    for command in ("train", "--resume"), ("eval",), ("generate",):
        output = run(*command, tmp_path, status=2).output
        assert re.search(r"model\.safetensors: expected \d+ bytes, got \d+", output)


@pytest.mark.parametrize(
    ("good", "kept"), [(1, "no checkpoint was saved yet"), (5, r"the newest checkpoint is \S+/run/last")]
)
def test_a_run_that_fails_says_what_is_left(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int, kept: str
) -> None:
    losses = iter([5.0] * good + [float("nan")])
    monkeypatch.setattr(neurogen_cy.NeuroGen, "evaluate", lambda *arguments: next(losses))
    output = run(*TRAIN, "--save-every", 8, "--out", tmp_path / "run", status=1).output
    assert re.search(rf"step {2 * good + 2}: expected a finite validation loss, got nan \({kept}\)", output)


def test_eval_gives_what_the_run_ended_with(run: Run) -> None:
    nats = checkpoint.read_meta("runs/brain/last")["extra"]["run"]["validation"]
    output = run("eval", "runs/brain/last", "--threads", 1).output
    match = re.search(r"\nbrain +(\d\.\d+) +(\d\.\d+) +(\d+\.\d+)\n", output)
    assert match is not None
    assert float(match[2]) == pytest.approx(nats, abs=1e-4) and "-gram" not in output
    assert "384 bytes predicted" in output
    assert match[0] in run("eval", "runs/brain/last", "--data", "text.txt").output
    assert len(re.findall("-gram", run("eval", "runs/brain", "--ngrams").output)) == 3
    assert "3,984 bytes predicted" in run("eval", "runs/brain", "--all").output


def test_eval_refuses(run: Run, tmp_path: Path) -> None:
    assert (
        "expected --all or --ngrams, got both"
        in run("eval", "runs/brain", "--all", "--ngrams", status=2).output
    )
    assert (
        "absent: expected a checkpoint directory, got no such path" in run("eval", "absent", status=2).output
    )
    (tmp_path / "short").write_text("short")
    assert "to evaluate, got 1" in run("eval", "runs/brain", "--data", tmp_path / "short", status=2).output


def test_generate_continues_the_prompt(run: Run) -> None:
    one = run("generate", "runs/brain", "--prompt", "The \u00e9", "--tokens", 50, "--seed", 1).output
    assert one.startswith("The \u00e9") and len(one) > 20
    assert one == run("generate", "runs/brain", "--prompt", "The \u00e9", "--tokens", 50, "--seed", 1).output
    assert one != run("generate", "runs/brain", "--prompt", "The \u00e9", "--tokens", 50, "--seed", 2).output
    greedy = [run("generate", "runs/brain/last", "--greedy", "--tokens", 30).output for _ in range(2)]
    assert greedy[0] == greedy[1]
    sampled = run(
        "generate", "runs/brain", "--top-k", 3, "--top-p", 0.9, "--temperature", 0.5, "--tokens", 9
    ).output
    assert sampled.startswith("\n")


@pytest.mark.parametrize(
    "arguments",
    [["--temperature", "-1"], ["--top-p", "1.5"], ["--top-k", "-1"], ["--prompt", ""], ["--tokens", "0"]],
)
def test_generate_refuses(run: Run, arguments: list[str]) -> None:
    output = run("generate", "runs/brain", *arguments, status=2).output
    assert "Error: " in output and "Traceback" not in output


def test_info(run: Run) -> None:
    output = run("info").output
    assert f"neurogen_cy {__version__}" in output and "backend cpu: ready" in output
    assert re.search(r"backend cuda: (ready|not available: .+)", output)
    for preset in ("tiny", "small", "base", "large"):
        assert re.search(rf"\n{preset} +[\d,]+ +[\d,]+ +[\d.]+ [MG]B  ", output)
    meta = json.loads(run("info", "runs/brain").output)
    assert meta["extra"]["name"] == "brain" and meta["extra"]["corpus"]["bytes"] == 4000
    assert "absent: expected a checkpoint directory" in run("info", "absent", status=2).output


def test_ctrl_c_saves_and_the_resumed_run_equals_an_unbroken_one(
    run: Run, files: Path, tmp_path: Path
) -> None:
    steps = ["--steps", "3000", "--save-every", "5000"]
    command = [sys.executable, "-m", "neurogen_cy", *TRAIN, *steps, "--out", str(tmp_path / "broken")]
    environment = {**os.environ, "PYTHONPATH": str(Path(neurogen_cy.__file__).parents[1])}
    process = subprocess.Popen(
        command, cwd=files, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(read_metrics(tmp_path / "broken/metrics.jsonl")) < 30:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert re.search(r"stopped by SIGINT at step \d+ of 3000, saved in .*broken/last\nto continue: ", output)
    assert "Traceback" not in errors
    run(*RESUME, "auto", "--out", tmp_path / "broken", "--threads", 1)
    run(*TRAIN, *steps, "--out", tmp_path / "whole")
    for name in ("last/model", "last/optimizer", "last/state", "best/model"):
        one, other = (tmp_path / out / f"{name}.safetensors" for out in ("broken", "whole"))
        assert one.read_bytes() == other.read_bytes()
