"""Damaged tokenizers, texts, caches and checkpoints' tokenizers through the loaders, many of them.

`python tests/mutated_data.py --cases 500` prints what became of them. Each case is made from its number alone. A child
process runs them; one that dies or takes longer than a minute is counted against the case it was at.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import io
import json
import logging
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import tokenizer_makers as makers

import neurogen_cy as ng
from neurogen_cy import checkpoint
from neurogen_cy.corpus import open_corpus
from neurogen_cy.data import default_corpus
from neurogen_cy.tokenization import Tokenizer, load, load_saved

PATIENCE = 60.0
HOSTILE = (
    None, True, -1, 0, 2**31, 2**63, -(2**63), 1e308, float("nan"), "", "\0", "a" * 100_000, "\ud800", [], {},
    [[]] * 1000,
    {"type": "nonsense"}, {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
)  # fmt: skip
SAMPLE = "Some text, caf\u00e9 \U0001f600\n\n  and more of it aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"


class Broken(AssertionError):
    """What must never happen."""


def damage(data: bytes, draw: random.Random) -> bytes:
    """Return other bytes: flipped bits, a cut, a stretch twice, moved, zeroed or of nonsense."""
    out = bytearray(data)
    how = draw.choice(["flip", "flips", "cut", "double", "swap", "zero", "nonsense", "invalid"])
    a, b = sorted(draw.randrange(len(out) + 1) for _ in range(2))
    if how in ("flip", "flips"):
        for _ in range(1 if how == "flip" else draw.randint(2, 30)):
            out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del out[a:]
    elif how == "double":
        out[b:b] = out[a:b]
    elif how == "swap":
        out = out[b:] + out[a:b] + out[:a]
    elif how == "zero":
        b = min(b, a + 50)
        out[a:b] = bytes(b - a)
    elif how == "nonsense":
        out[a : a + 20] = draw.randbytes(20)
    else:
        out[a:a] = draw.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80" * 1000])
    return bytes(out)


def hostile_json(data: bytes, draw: random.Random) -> bytes:
    """Return JSON in which some values are others, or gone."""
    root = json.loads(data)
    for _ in range(draw.randint(1, 3)):
        node = root
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(node[key], (dict, list)) and draw.random() < 0.8:
                node = node[key]
                continue
            if draw.random() < 0.2:
                del node[key]
            else:
                node[key] = draw.choice(HOSTILE)
            break
    return json.dumps(root).encode("utf-8", "surrogatepass")


def use(tokenizer: Tokenizer) -> None:
    """Whatever loads must work."""
    for text in (SAMPLE.encode(), b"", b"ok \xff\xfe", b"a" * 3000):
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            expect_clear(error)
            continue
        if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            raise Broken(f"ids outside 0..{tokenizer.vocab_size - 1}")
        decoder = tokenizer.decoder()
        if "".join([decoder.push(int(i)) for i in ids]) + decoder.finish() != tokenizer.decode(ids):
            raise Broken("the text as it comes is not the text")


def expect_clear(error: Exception) -> None:
    if "expected" not in str(error):
        raise Broken(f"an unclear message: {error!r}") from error


def tokenizer_file(folder: Path, draw: random.Random) -> str:
    kinds = ["byte-level", "metaspace", "word-piece", "word-level"]
    if importlib.util.find_spec("sentencepiece"):
        kinds += ["sp-unigram", "sp-bpe"]
    kind = draw.choice(kinds)
    raw = makers.content(kind)
    changed = hostile_json(raw, draw) if not kind.startswith("sp-") and draw.random() < 0.5 else damage(raw, draw)
    (folder / "t").write_bytes(changed)
    tokenizer = load(folder / "t")
    if changed != raw and tokenizer.sha256 == makers.make(kind).sha256:
        raise Broken("a changed file has the hash of the other")
    use(tokenizer)
    return "used, by a hash of its own"


def checkpoint_tokenizer(folder: Path, draw: random.Random) -> str:
    tokenizer = makers.make("byte-level")
    wiring = (ng.Projection("embedding", "a"), ng.Projection("a", "broca_out"))
    config = ng.Config(vocab_size=tokenizer.vocab_size, dim=32, regions=(ng.Region("a", 32, 0),), projections=wiring)
    ng.NeuroGen(config, backend="cpu").save(folder / "c", tokenizer=tokenizer)
    path = folder / "c" / draw.choice(["tokenizer.json", "tokenizer.json", "meta.json"])
    raw = path.read_bytes()
    path.write_bytes(hostile_json(raw, draw) if draw.random() < 0.4 else damage(raw, draw))
    if path.name == "meta.json" and json_or_none(path) == json.loads(raw) or path.read_bytes() == raw:
        return "the same"
    found = load_saved(folder / "c")
    raise Broken(f"a changed {path.name} was taken: {found.to_dict()}, {checkpoint.read_meta(folder / 'c')}")


def json_or_none(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def text_file(folder: Path, draw: random.Random) -> str:
    text = default_corpus()[0][: draw.choice([300, 30_000])] + makers.MORE.encode()
    records = "".join(json.dumps({"text": line}) + "\n" for line in text.decode().split("\n\n")).encode()
    name, whole = draw.choice([("a.txt", text), ("a.jsonl", records)])
    compressed = importlib.util.find_spec("zstandard") is not None and draw.random() < 0.5
    raw = pack(whole) if compressed else whole
    path = folder / (name + ".zst" * compressed)
    changed = damage(raw, draw)
    path.write_bytes(changed)
    tokenizer = makers.make(draw.choice(["bytes", "byte-level", "metaspace", "word-piece"]))
    found = open_corpus(path, tokenizer, validation=path, cache=folder / "cache")
    if tokenizer.kind == "bytes" or getattr(tokenizer, "_byte_level", False):
        ids = [i for i in found.training.ids if i != tokenizer.end] if tokenizer.kind != "bytes" else found.training.ids
        kept = tokenizer.decode_bytes(ids)
        if name == "a.txt" and not compressed and kept != changed:
            raise Broken("a text came back changed")
        if compressed and changed != raw and name == "a.txt" and kept not in (whole, whole * 2):
            raise Broken("a damaged zstd frame was taken for another text")
    return "read"


def pack(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def cache_file(folder: Path, draw: random.Random) -> str:
    (folder / "a.txt").write_bytes(default_corpus()[0][:20_000])
    tokenizer, root = makers.make("byte-level"), folder / "cache"
    wanted = open_corpus(folder / "a.txt", tokenizer, cache=root).training.ids.tobytes()
    path = next(root.glob("*/")) / draw.choice(["tokens.bin", "tokens.bin", "starts.bin", "pieces.bin", "meta.json"])
    raw = path.read_bytes()
    path.unlink()  # the mapped file stays whole
    path.write_bytes(hostile_json(raw, draw) if path.suffix == ".json" and draw.random() < 0.5 else damage(raw, draw))
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    logging.getLogger("neurogen_cy").addHandler(handler)
    found = open_corpus(folder / "a.txt", tokenizer, cache=root)
    logging.getLogger("neurogen_cy").removeHandler(handler)
    if found.training.ids.tobytes() != wanted:
        raise Broken("a damaged cache was used")
    if not told.getvalue() and path.read_bytes() != raw and (
        path.name != "meta.json" or json_or_none(path) != json.loads(raw)
    ):
        raise Broken("a damaged cache was used, or made anew in silence")
    return "made anew, aloud" if told.getvalue() else "the same"


KINDS = (tokenizer_file, checkpoint_tokenizer, text_file, cache_file)


def run_case(number: int) -> tuple[str, str]:
    """Return the kind of a case, and what became of it; raises where something is wrong."""
    draw = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    folder = Path(tempfile.mkdtemp(prefix="mutated-"))
    try:
        return kind.__name__, kind(folder, draw)
    except (ValueError, OSError) as error:
        expect_clear(error)
        return kind.__name__, "refused, by expected and got"
    finally:
        shutil.rmtree(folder)


def serve(numbers: list[int]) -> None:
    """Run cases; a line of JSON before and after each."""
    logging.getLogger("neurogen_cy").addHandler(logging.NullHandler())
    logging.getLogger("neurogen_cy").propagate = False
    for number in numbers:
        print(json.dumps([number]), flush=True)
        try:
            kind, result = run_case(number)
        except BaseException as error:
            kind, result = KINDS[number % len(KINDS)].__name__, f"BROKEN: {type(error).__name__}: {error}"[:300]
        print(json.dumps([number, kind, result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]), flush=True)


def campaign(cases: int, first: int = 0) -> tuple[collections.Counter[str], list[str], int]:
    """Run cases; return how many ended how, what was wrong, and the largest resident memory in MB."""
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    left, peak = list(range(first, first + cases)), 0
    while left:
        command = [sys.executable, __file__, "--serve", *map(str, left)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert child.stdout is not None
        at, killed = left[0], False
        while True:
            clock = threading.Timer(PATIENCE, child.kill)
            clock.start()
            line = child.stdout.readline()
            killed = not clock.is_alive()
            clock.cancel()
            if not line:
                break
            at, *rest = json.loads(line)
            if rest:
                kind, result, kilobytes = rest
                counts[f"{kind}: {result if not result.startswith('BROKEN') else 'BROKEN'}"] += 1
                peak = max(peak, kilobytes // 1024)
                left.remove(at)
                if result.startswith("BROKEN"):
                    wrong.append(f"case {at}: {result}")
        code = child.wait()
        child.stdout.close()
        if left:
            wrong.append(f"case {at}: {'hung' if killed else f'died with status {code}'}")
            counts["hung" if killed else "crashed"] += 1
            left.remove(at)
    return counts, wrong, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--serve", type=int, nargs="+")
    args = parser.parse_args()
    if args.serve:
        with contextlib.suppress(BrokenPipeError):
            serve(args.serve)
        return
    counts, wrong, peak = campaign(args.cases, args.first)
    for what, count in sorted(counts.items()):
        print(f"{count:6}  {what}")
    print(*wrong, sep="\n")
    print(f"{args.cases} cases, {len(wrong)} wrong, largest resident memory {peak} MB")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
