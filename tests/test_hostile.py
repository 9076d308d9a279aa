"""Checkpoints and configurations that somebody damaged on purpose, and small runs of the two campaigns."""

import json
import os

import kill_campaign
import mutate_checkpoints
import mutations
import numpy as np
import pytest
from kill_campaign import CONFIG
from safetensors.numpy import load, save

import neurogen_cy as ng
from neurogen_cy import checkpoint

KEY = "proj.pfc.broca_out.drive.0"


@pytest.fixture
def place(tmp_path):
    """A checkpoint of a model that has learnt a little."""
    run = kill_campaign.Run(tmp_path, "cpu")
    run.step()
    run.save()
    return tmp_path / "last"


def contents(place):
    return {path.name: path.read_bytes() for path in place.iterdir()}


def rewrite(place, files):
    """Puts these in its place, with checksums that fit."""
    assert mutations.seal(files)
    for name, data in files.items():
        (place / name).write_bytes(data)


def set_tensor(group, key, change):
    def apply(files):
        arrays = load(files[f"{group}.safetensors"])
        arrays[key] = np.ascontiguousarray(change(arrays[key].copy()))
        files[f"{group}.safetensors"] = save(arrays)

    return apply


def set_fact(*path, value):
    def apply(files):
        facts = json.loads(files["meta.json"])
        parent = facts
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = value
        files["meta.json"] = json.dumps(facts).encode()

    return apply


def drop_fact(name):
    def apply(files):
        facts = json.loads(files["meta.json"])
        del facts[name]
        files["meta.json"] = json.dumps(facts).encode()

    return apply


def first(value):
    def apply(array):
        array.reshape(-1)[0] = value
        return array

    return apply


def retype(dtype):
    def apply(files):
        data = files["model.safetensors"]
        text = data.replace(b'"F32","shape":[64]', b'"%s","shape":[64]' % dtype, 1)
        size = int.from_bytes(data[:8], "little") + len(text) - len(data)
        files["model.safetensors"] = size.to_bytes(8, "little") + text[8:]

    return apply


# {what is wrong, its checksums made to fit: (change, message)}
SEALED = {
    "rows": (set_tensor("model", f"{KEY}.rows", first(1)), "rows: expected 0 to 0, each 2 times"),
    "cols out of range": (set_tensor("model", f"{KEY}.cols", first(2**31 - 1)), "cols: expected 2 ascending"),
    "cols twice": (set_tensor("model", f"{KEY}.cols", first(1)), "cols: expected 2 ascending columns in 0..1"),
    "NaN": (set_tensor("model", "decoder.weight", first(np.nan)), "finite values in -inf..inf, got nan"),
    "moment": (set_tensor("optimizer", "decoder.bias.moment2", first(-1)), "expected finite values in 0..inf, got -1"),
    "moment NaN": (set_tensor("optimizer", "decoder.bias.moment1", first(np.nan)), "expected finite .* got nan"),
    "moment too large": (set_tensor("optimizer", "decoder.bias.moment1", first(3e38)), "in -1.8.* to 3.0.*e.38"),
    "no seed": (drop_fact("seed"), "expected the facts config, .*, got no seed"),
    "delay": (set_fact("config", "projections", 0, "delay", value=[0] * 10**5), "delay: expected an integer .{0,300}$"),
    "state": (set_tensor("state", "broca.o", lambda a: a[:1]), r"expected float32 \(4, 32\), got float32 \(1, 32\)"),
    "dtype": (set_tensor("optimizer", "decoder.bias.moment1", np.float64), "expected float32 .*, got float64"),
    "unknown dtype": (retype(b"BF16"), "model.safetensors: expected"),
    "streams": (set_fact("streams", value=5), r"state.safetensors: broca.o: expected float32 \(5, 32\), got"),
    "streams too many": (set_fact("max_tokens", value=2**31 - 1), "expected at most 2147483647"),
    "step": (set_fact("step", value=-1), "step: expected an integer in 0.."),
    "step true": (set_fact("step", value=True), "step: expected an integer in 0..4611686018427387904, got True"),
    "seed": (set_fact("seed", value="0"), "seed: expected an integer in 0..18446744073709551615, got '0'"),
    "nonfinite": (set_fact("nonfinite", value=[]), r"nonfinite: expected 'raise' or 'skip', got \[\]"),
    "lr": (set_fact("optimizer", "lr", value=-1), "lr: expected a finite number >= 0, got -1"),
    "optimizer": (set_fact("optimizer", value=None), "optimizer: expected a table of settings, got None"),
    "optimizer's name": (set_fact("optimizer", value="a" * 10**5), "a table of settings, got .{0,300}$"),
    "dst": (set_fact("config", "projections", 0, "dst", value="a" * 10**5), "expected broca_out or one of .{0,400}$"),
    "betas": (set_fact("optimizer", "betas", value="a" * 10**5), "betas: expected a pair of numbers, got .{0,300}$"),
    "config": (set_fact("config", "dim", value=33), "dim: expected a multiple of 32 from 32 to 2147483647, got 33"),
    "a long value": (set_fact("config", "dim", value="a" * 10**6), "dim: expected a multiple of 32 .{0,300}$"),
}


@pytest.mark.parametrize("name", SEALED)
def test_what_checksums_do_not_see_is_refused(place, name):
    change, message = SEALED[name]
    files = contents(place)
    change(files)
    rewrite(place, files)
    with pytest.raises(ng.CheckpointError, match=message):
        ng.NeuroGen.load(place, backend="cpu", threads=1)


DEEP = "[" * 100_000
TEXTS = {
    "deep": ('"x": ' + DEEP + "]" * 100_000 + ",", "maximum recursion depth|expected a readable JSON"),
    "open": (DEEP, "expected a readable JSON file"),
    "twice": ('"step": 1,', "expected each key once"),
    "digits": ('"x": ' + "9" * 101 + ",", "an integer of at most 100 digits, got 101"),
    "NaN": ('"x": NaN,', "expected finite numbers, got NaN"),
    "infinite": ('"x": -1e999,', "expected finite numbers, got -1e999"),
    "large": ('"x": "' + "a" * checkpoint.LARGEST_TEXT + '",', "meta.json: expected at most 8388608 bytes"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_json_is_refused(place, name):
    text, message = TEXTS[name]
    data = (place / "meta.json").read_text()
    (place / "meta.json").write_text("{" + text + data[1:])
    for read in (checkpoint.read_meta, checkpoint.read):
        with pytest.raises(ng.CheckpointError, match=message) as caught:
            read(place)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", [mutations.PIPE, mutations.ZEROS, mutations.LOOP, mutations.FOLDER, mutations.SPARSE])
@pytest.mark.parametrize("name", ["meta.json", "model.safetensors"])
def test_only_plain_files_of_their_size_are_read(place, name, kind):
    """A pipe would wait for its writer for ever, and /dev/zero has no end."""
    (place / name).unlink()
    mutations.put(place, {name: kind})
    with pytest.raises(ng.CheckpointError, match=f"{name}: expected"):
        ng.NeuroGen.load(place, backend="cpu")


def test_a_list_of_tensors_has_a_size(place):
    files = contents(place)
    data = files["state.safetensors"]
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end] + b" " * checkpoint.LARGEST_TEXT
    files["state.safetensors"] = len(text).to_bytes(8, "little") + text + data[end:]
    rewrite(place, files)
    with pytest.raises(ng.CheckpointError, match="state.safetensors: expected a list of tensors of at most 8388608"):
        checkpoint.read(place)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"a": "b" * checkpoint.LARGEST_TEXT}, "expected at most 8388608 bytes of JSON"),
        ({1: 0, "1": 0}, "expected each key once"),
        ({"a": 10**101}, "an integer of at most 100 digits"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(place, meta, message):
    before = contents(place)
    deep = []
    for _ in range(5000):
        deep = [deep]
    for facts, text in ((meta, message), ({"a": deep}, "less deep in one another")):
        with pytest.raises(ValueError, match=text):
            checkpoint.write(place, {}, facts)
    assert contents(place) == before


TOMLS = {
    "deep": ("x = " + "[" * 2000, "expected a configuration in TOML, got"),
    "long line": (".".join("a" * 3000) + " = 1", "expected lines of at most 4096 characters"),
    "large": ("# comment\n" * 30_000, "expected a configuration of at most 262144 bytes"),
    "large number": ("vocab_size = 0x" + "f" * 4000, "vocab_size: expected .*, got an integer of 16000"),
    "large delay": ('[[projections]]\nsrc="a"\ndst="b"\ndelay = 0x' + "f" * 4000, "delay: expected an integer from 0"),
    "bytes": ("\xff", "expected a configuration in TOML"),
    "long key": ("a" * 4000 + " = 1", "unknown key 'aaaa.{0,300}$"),
}


@pytest.mark.parametrize("name", TOMLS)
def test_hostile_toml_is_refused(tmp_path, name):
    text, message = TOMLS[name]
    CONFIG.to_toml(tmp_path / "c.toml")
    rest = (tmp_path / "c.toml").read_text()
    if name == "large number":
        rest = rest.split("\n", 1)[1]  # vocab_size stands first
    elif name == "large delay":
        text, rest = rest, text
    (tmp_path / "c.toml").write_bytes((text + "\n" + rest).encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        ng.Config.from_toml(tmp_path / "c.toml")


def test_a_loader_that_fails_changes_no_model(place):
    """All or nothing, into a model that lives: parameters, state, moments."""
    model = ng.NeuroGen.load(place, backend="cpu", threads=1)
    before = mutate_checkpoints.contents(model)
    wrong = {key: np.asarray(view) + 1 for key, view in model.parameters().items() if view.dtype == "float32"}
    wrong[next(reversed(wrong))][...] = np.nan
    state = {key: array + 1 for key, array in model.state().items()}
    state["broca.o"] = state["broca.o"][:, :5]
    moments = {key: [np.asarray(m) + 1 for m in pair] for key, pair in model._engine.moments().items()}
    moments["decoder.bias"][1] = moments["decoder.bias"][1].astype(np.float64)
    for call in (
        lambda: model.load_parameters(wrong),
        lambda: model.load_state(state),
        lambda: model._engine.load_moments(moments),
    ):
        with pytest.raises((TypeError, ValueError), match="expected"):
            call()
        assert mutate_checkpoints.contents(model) == before


def test_mutated_files_are_refused_or_as_they_were():
    """tests/mutate_checkpoints.py runs 10,000 and 2,000 of them."""
    for kind, count in (("checkpoints", 100), ("configs", 40)):
        summary = mutate_checkpoints.campaign(kind, count, seed=7)
        assert not summary["wrong"] and sum(summary["outcomes"].values()) == count
        assert summary["outcomes"]["refused"] > count / 2


def test_a_killed_run_goes_on(backend):
    """tests/kill_campaign.py kills 200 times."""
    summary = kill_campaign.campaign(3, backend, seed=os.getpid(), steps=40)
    assert summary["failures"] == [] and summary["steps"] > 0


def test_the_campaigns_see_what_is_wrong(tmp_path, place, monkeypatch):
    """A check that cannot fail is none."""
    bits = kill_campaign.unkilled("cpu", 4)
    check = lambda folder, said, expected: kill_campaign.check(folder, "cpu", said, expected)[0]
    assert check(place.parent, 1, bits) is None
    assert check(place.parent, 1, bits[::-1]) == "saved at step 1, other bits at step 1"
    assert check(place.parent, 1, [*bits[:3], "", bits[4]]) == "saved at step 1, other bits at step 3"
    assert check(place.parent, 3, bits) == "expected step 3 or 4, got 1"
    assert check(tmp_path / "none", 5, bits) == "no checkpoint, step 5 was said"
    cases = mutate_checkpoints.Checkpoints(tmp_path)
    monkeypatch.setattr(mutations, "CHECKPOINT", {"none": lambda rng, files: None})
    read = checkpoint.read

    def changed(directory):
        tensors, meta = read(directory)
        tensors["model"]["decoder.bias"][0] += 1
        return tensors, meta

    assert cases.run(0)[1] == "unchanged"
    monkeypatch.setattr(checkpoint, "read", changed)
    assert {cases.run(seed)[1] for seed in range(8)} == {
        "wrong: taken, but not what was saved", "wrong: the model does not hold what the file says",
    }  # fmt: skip
    monkeypatch.setattr(mutate_checkpoints, "SLACK", -(10**9))
    assert cases.run(0)[1].startswith("wrong: ") and "bytes at the peak" in cases.run(0)[1]
