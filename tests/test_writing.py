"""What a model writes as text: stop strings, several continuations, conversations; `generate` and `chat`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import CONFIG, SETTINGS, begin

from neurogen_cy import NeuroGen
from neurogen_cy.cli import main
from neurogen_cy.conversation import Conversation
from neurogen_cy.tokenization import ByteTokenizer
from neurogen_cy.writing import Continuation, StopStrings, written

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the small brain, a little trained."""
    out = tmp_path_factory.mktemp("brain")
    begin(out, SETTINGS).run()
    return out / "last"


@pytest.fixture
def run(brain: Path) -> Run:
    """Run a command on that checkpoint."""

    def invoke(command: str, *arguments: object, status: int = 0, typed: str | None = None) -> Result:
        result = CliRunner().invoke(main, [command, str(brain), "--threads", "1", *map(str, arguments)], input=typed)
        assert result.exit_code == status, result.output
        return result

    return invoke


def lines_of(result: Result) -> list[str]:
    """Its lines; a brain may well write what str.splitlines takes for an end of a line (a vertical tab, U+0085)."""
    return result.output.removesuffix("\n").split("\n")


def passed(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    """What comes through, and what was found."""
    strings = StopStrings(stops)
    out = "".join([strings.push(piece) for piece in pieces] + [strings.finish()])
    return out, strings.found


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.lists(st.text("abc", max_size=4), max_size=8))
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_where_the_whole_text_would_be_cut(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    places = [text.find(stop) for stop in stops if stop in text]
    out, found = passed(stops, pieces)
    if found is None:
        assert out == text and not places
    else:
        # It is found as soon as it is there: no stop ends before this one does.
        assert found in stops and text.startswith(out + found) and not any(stop in out for stop in stops)


def test_stop_strings_hold_back_no_more_than_they_must() -> None:
    strings = StopStrings(["\n\n", "User:"])
    assert [strings.push(piece) for piece in ("one\n", "two U", "ser", " User", ":x", "y")] == [
        "one", "\ntwo ", "", "User ", "", "",
    ]  # fmt: skip
    assert strings.found == "User:" and strings.finish() == ""
    assert passed(["ab", "abc"], ["xabc"]) == ("x", "abc")
    turn = StopStrings(["\n"], skip_blank=True)
    assert [turn.push(piece) for piece in ("\n", " \n a", " b", "\nc")] == ["", "a", " b", ""]
    assert turn.found == "\n"
    with pytest.raises(ValueError, match="stop: expected at least one character, got an empty text"):
        StopStrings([""])


class Ended(ByteTokenizer):
    """Bytes, of which a zero ends a document."""

    end = 0


def test_a_continuation_ends_at_its_document_or_stop() -> None:
    one = Continuation(Ended())
    assert [one.push(byte) for byte in (65, 0xC3, 0, 66)] == ["A", "", "\ufffd", ""]
    assert (one.text, one.tokens, one.ending, one.finished) == ("A\ufffd", 3, "end of document", True)
    two = Continuation(ByteTokenizer(), ["b"])
    assert [two.push(byte) for byte in b"abc"] == ["a", "", ""] and (two.ending, two.tokens) == ("b", 2)
    three = Continuation(ByteTokenizer(), ["xy"])
    assert [three.push(120), three.finish(), three.ending] == ["", "x", "tokens"]


def test_generate_several_side_by_side_as_each_alone(run: Run, tmp_path: Path) -> None:
    """The model's own order of streams is the one thing a continuation depends on: the first is as if alone."""
    common = ("--tokens", 20, "--seed", 3)
    alone = json.loads(run("generate", "--prompt", "The ", "--json", *common).output)
    assert alone["prompt"] == "The " and alone["tokens"] == 20 and alone["ending"] == "tokens" and alone["seed"] == 3
    (tmp_path / "prompts.txt").write_text("A lamp\n\nOr \u00e9\n")
    arguments = ("--prompt", "The ", "--prompts", tmp_path / "prompts.txt", "--continuations", 2, *common)
    lines = [json.loads(line) for line in lines_of(run("generate", *arguments, "--json"))]
    assert [line["prompt"] for line in lines] == ["The ", "The ", "A lamp", "A lamp", "Or \u00e9", "Or \u00e9"]
    assert lines[0]["text"] == alone["text"] and len({line["text"] for line in lines}) == 6
    text = run("generate", *arguments).output
    for number, line in enumerate(lines, start=1):
        assert f"[{number} of 6] {line['prompt']}{line['text']}\n" in text
    assert json.loads(run("generate", "--prompts", "-", "--json", *common, typed="The \n").output) == alone


def test_generate_stops_before_a_string(run: Run) -> None:
    common = ("--prompt", "The ", "--tokens", 60, "--seed", 3)
    whole = json.loads(run("generate", *common, "--json").output)["text"]
    stop = whole[20:22]
    cut = whole.index(stop)
    line = json.loads(run("generate", *common, "--json", "--stop", stop, "--stop", "not there").output)
    assert (line["text"], line["ending"]) == (whole[:cut], stop) and line["tokens"] < 60
    assert run("generate", *common, "--stop", stop).output == f"The {whole[:cut]}\n"


def test_generate_refuses_what_it_cannot_read(run: Run, tmp_path: Path) -> None:
    assert "got an empty text" in run("generate", "--stop", "", status=2).output
    (tmp_path / "empty").write_text("\n\n")
    output = run("generate", "--prompts", tmp_path / "empty", status=2).output
    assert "expected texts in" in output and "one a line, got none" in output
    assert "No such file" in run("generate", "--prompts", tmp_path / "absent", status=2).output


def test_many_prompts_are_more_than_a_window_holds(run: Run, tmp_path: Path) -> None:
    (tmp_path / "many").write_text("a line\n" * 100)
    lines = lines_of(run("generate", "--prompts", tmp_path / "many", "--tokens", 3, "--json", "--seed", 1))
    assert len(lines) == 100 and len({json.loads(line)["text"] for line in lines}) > 10


def conversation(brain: Path, **sampling: float) -> tuple[NeuroGen, Conversation]:
    """A new conversation with the brain."""
    model = NeuroGen.load(brain, backend="cpu", streams=1, max_tokens=16, threads=1)
    return model, Conversation(model, ByteTokenizer(), ["\n"], 30, 7, **sampling)


def test_the_state_has_heard_exactly_what_was_said(brain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, talk = conversation(brain, temperature=0.8)
    heard: list[int] = []
    push = Continuation.push
    monkeypatch.setattr(Continuation, "push", lambda one, token: heard.append(token) or push(one, token))
    for line in (b"Hello there\n", b"What is a list?\n"):
        heard += line
        answer = "".join(talk.answer(line.decode()))
        assert talk.said[-1] == (line.decode(), answer) and "\n" not in answer
    after = model.state()
    model.brain.reset()
    x = np.empty((1, CONFIG.dim), np.float32)
    for token in heard:
        model.embedding.encode_into(np.array([token], np.int32), x)
        model.brain.step(x)
    for key, array in model.state().items():
        np.testing.assert_allclose(after[key], array, rtol=1e-5, atol=1e-6, err_msg=key)


def test_a_saved_conversation_goes_on_as_if_it_had_not_stopped(brain: Path, tmp_path: Path) -> None:
    _, talk = conversation(brain)
    "".join(talk.answer("Hello\n"))
    talk.save(tmp_path / "talk")
    _, other = conversation(brain)
    other.load(tmp_path / "talk")
    assert other.said == talk.said
    assert list(other.answer("And?\n")) == list(talk.answer("And?\n"))
    talk.reset()
    assert talk.said == [] and not any(array.any() for array in talk._model.state().values())
    (tmp_path / "text").write_text("no conversation")
    before = other._model.state()
    for name in ("text", "absent", brain / "state.safetensors", brain / "model.safetensors"):
        with pytest.raises((ValueError, OSError), match="conversation|No such file"):
            other.load(tmp_path / name)
    assert all(np.array_equal(array, before[key]) for key, array in other._model.state().items())
    assert [path.name for path in tmp_path.iterdir()].count("talk") == 1 and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OSError):
        other.save(tmp_path / "no" / "folder")


def test_chat(run: Run, tmp_path: Path) -> None:
    options = ("--seed", 5, "--tokens", 20, "--stop", "what it cannot have learnt")
    once, twice = (run("chat", *options, typed="Hello\n" * times).stdout for times in (1, 2))
    assert twice.startswith(once) and twice != once * 2 and len(once) > 10
    assert run("chat", *options, typed="Hello\n/quit\nHello\n").stdout == once
    reset = run("chat", *options, typed="Hello\n/reset\nHello\n")
    assert reset.stdout == once * 2 and "forgotten" in reset.stderr
    saved = run("chat", *options, typed=f"Hello\n/save {tmp_path / 'talk'}\n")
    assert saved.stdout == once and f"saved in {tmp_path / 'talk'}" in saved.stderr
    assert run("chat", *options, typed=f"/load {tmp_path / 'talk'}\nHello\n").stdout == f"Hello\n{twice}"
    cold = run("chat", *options, typed="/temperature 0.01\nHello\n").stdout
    assert cold == run("chat", *options, "--temperature", 0.01, typed="Hello\n").stdout != once
    never = ("--stop", "what it cannot have learnt")
    line, whole = (run("chat", "--greedy", *stop, typed="Hello\n").stdout for stop in ((), never))
    assert line.count("\n") == 1 and whole.startswith(line[:-1])


def test_chat_says_what_is_wrong_and_goes_on(run: Run, tmp_path: Path) -> None:
    typed = f"/nothing\n/save\n/temperature hot\n/temperature -1\n/load {tmp_path / 'absent'}\n/help\n\nHello\n"
    result = run("chat", "--tokens", 5, typed=typed)
    for message in (
        "/nothing: no such command", "/save: expected something after it", "could not convert string to float: 'hot'",
        "/temperature: expected a finite number > 0, got -1", "No such file", "/reset            forget everything",
    ):  # fmt: skip
        assert message in result.stderr, message
    assert result.stdout.count("\n") == 2 and "Traceback" not in result.output
    assert "Error: " in run("chat", "--top-p", 2, status=2).output


def test_written_is_what_generate_gives(brain: Path) -> None:
    model = NeuroGen.load(brain, backend="cpu", streams=1, max_tokens=16, threads=1)
    ids = [int(step[0]) for step in model.generate(np.frombuffer(b"The ", np.uint8), 12, seed=2)]
    assert written(model, ByteTokenizer(), "The ", 12, seed=2) == bytes(ids).decode("utf-8", "replace")
