"""Ways of damaging a checkpoint or a configuration, for mutate_checkpoints.py. All draw from the generator they get.

A checkpoint is {file name: bytes} here. CHECKPOINT maps names to functions (rng, files) -> None that change it in
place; `seal` makes its checksums right again, so that what stands behind them is reached.
"""

import hashlib
import json
import os

import numpy as np
from safetensors.numpy import load, save

from neurogen_cy import checkpoint

META = "meta.json"
HOSTILE = (
    None, True, False, -1, 0, 1, 2, 31, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**50, 10**400, -0.0, 1.5,
    1e-320, 1e308, float("nan"), float("inf"), "", "1", "a" * 100_000, "\ud800", "\0", "../../etc/passwd", [], {}, [[]],
    {"a": 1}, [0] * 10_000, list("ab"), [1.0, 30.0], [30.0, 1.0], "drive", "gate", "embedding",
)  # fmt: skip


def pick(rng, items):
    return items[rng.integers(len(items))]


def tensor_file(rng, files):
    return pick(rng, sorted(name for name in files if name != META))


def any_file(rng, files):
    return pick(rng, sorted(files))


# ---- bytes --------------------------------------------------------------------------------------------------------


def flip(rng, data):
    data = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(data)


def cut(rng, data):
    return data[: rng.integers(len(data))]


def append(rng, data):
    return data + rng.bytes(int(rng.integers(1, 100)))


def blank(rng, data):
    first = rng.integers(len(data))
    return data[:first] + bytes(min(len(data) - first, int(rng.integers(1, 4096)))) + data[first + 4096 :]


def insert(rng, data):
    at = rng.integers(len(data))
    return data[:at] + rng.bytes(int(rng.integers(1, 30))) + data[at:]


def repeat(rng, data):
    first, last = sorted(rng.integers(0, len(data), 2))
    return data[:last] + data[first:]


BYTES = {"flip": flip, "cut": cut, "append": append, "blank": blank, "insert": insert, "repeat": repeat}


def of_bytes(change):
    def apply(rng, files):
        name = any_file(rng, files)
        files[name] = change(rng, files[name])

    return apply


# ---- whole tensors ------------------------------------------------------------------------------------------------


def swap_files(rng, files):
    one, other = rng.permutation(sorted(set(files) - {META}))[:2]
    files[one], files[other] = files[other], files[one]


def swap_tensors(rng, files):
    """Of one file or of two, of the same shape where there are such."""
    one, other = tensor_file(rng, files), tensor_file(rng, files)
    a = load(files[one])
    b = a if one == other else load(files[other])
    key = pick(rng, sorted(a))
    alike = [k for k in sorted(b) if b[k].shape == a[key].shape and b[k].tobytes() != a[key].tobytes()]
    twin = pick(rng, alike or sorted(b))
    a[key], b[twin] = b[twin], a[key]
    files[one], files[other] = save(a), save(b)


def on_tensor(change):
    """change(rng, array) -> array, of one tensor."""

    def apply(rng, files):
        name = tensor_file(rng, files)
        arrays = load(files[name])
        key = pick(rng, sorted(key for key in arrays if arrays[key].size))
        arrays[key] = np.ascontiguousarray(change(rng, arrays[key].copy()))
        files[name] = save(arrays)

    return apply


def reshape(rng, a):
    shapes = ((-1,), (1, *a.shape), (*a.shape, 1), a.shape[::-1], (a.size, 1), (1, a.size))
    return a.reshape(pick(rng, [shape for shape in shapes if shape != a.shape]))


def retype(rng, a):
    if rng.random() < 0.5:
        return a.view(pick(rng, (np.uint8, np.int16, np.float16, np.int32, np.uint32, np.float32)))
    return a.astype(pick(rng, (np.float64, np.float16, np.int64, np.uint8, np.bool_)))


def poison(rng, a):
    worst = (-1, 2**31 - 1, -(2**31), 1) if a.dtype.kind == "i" else (np.nan, np.inf, -np.inf, 3e38, -1.0, 1e-45)
    a.reshape(-1)[rng.integers(a.size)] = pick(rng, worst)
    return a


def reorder(rng, a):
    return rng.permutation(a.reshape(-1)).reshape(a.shape)


def longer(rng, a):
    return np.concatenate([a, a[:1]])


def drop_tensor(rng, files):
    name = tensor_file(rng, files)
    arrays = load(files[name])
    del arrays[pick(rng, sorted(arrays))]
    files[name] = save(arrays)


def rename_tensor(rng, files):
    name = tensor_file(rng, files)
    arrays = load(files[name])
    key = pick(rng, sorted(arrays))
    new = pick(rng, (key + "x", key.upper(), "", "a" * 100_000, key[:-1], "proj.a.b.drive.0.blocks"))
    arrays[new] = arrays.pop(key) if rng.random() < 0.5 else arrays[key]
    files[name] = save(arrays)


# ---- safetensors' own list ----------------------------------------------------------------------------------------


def header_size(rng, files):
    name = tensor_file(rng, files)
    size = pick(rng, (0, 1, 7, len(files[name]), len(files[name]) - 8, 2**31, 2**32, 2**62, 2**63, 2**64 - 1))
    files[name] = size.to_bytes(8, "little") + files[name][8:]


def header(rng, files):
    name = tensor_file(rng, files)
    data = files[name]
    end = 8 + int.from_bytes(data[:8], "little")
    table, rest = json.loads(data[8:end]), data[end:]
    table.pop("__metadata__", None)
    key = pick(rng, sorted(table))
    size = len(rest)
    changes = {
        "dtype": ("F64", "F16", "BF16", "F8_E4M3", "F4", "C64", "I64", "BOOL", "f32", "", 5, None),
        "shape": ([2**62, 4], [2**64, 0], [0], [], [-1], [2**32, 2**32], [1.5], "a", None, [[1]], [1] * 9999, [2**63]),
        "data_offsets": ([0, size], [size, 0], [0, 2**63], [0, 0], [4, 8], [-4, 0], [0], None, [1, size], [0, 2**64]),
    }
    field = pick(rng, (*changes, "key", "metadata", "many", "spaces", "twice"))
    if field in changes:
        table[key][field] = pick(rng, changes[field])
    elif field == "key":
        table[pick(rng, ("x", "", "\0", "__metadata__"))] = table.pop(key)
    elif field == "metadata":
        deep = []
        for _ in range(200):
            deep = [deep]
        table["__metadata__"] = pick(rng, (5, {"a": 1}, {"a": "b" * 100_000}, deep, {"format": "np"}))
    elif field == "many":
        table |= {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(rng.integers(1, 3000))}
    text = json.dumps(table).encode()
    if field == "spaces":
        text += b" " * pick(rng, (1, 8, 10_000, checkpoint.LARGEST_TEXT))
    if field == "twice":
        text = text[:-1] + b"," + json.dumps({key: table[key]}).encode()[1:]
    files[name] = len(text).to_bytes(8, "little") + text + rest


# ---- meta.json ----------------------------------------------------------------------------------------------------


def places(value, path=()):
    """Paths of all values in nested tables and lists."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def fact(rng, files):
    """One value becomes another one, is taken out, or gets a neighbour."""
    facts = json.loads(files[META])
    path = pick(rng, list(places(facts)))
    parent = facts
    for key in path[:-1]:
        parent = parent[key]
    choice = rng.random()
    if choice < 0.7:
        parent[path[-1]] = pick(rng, HOSTILE)
    elif choice < 0.85:
        del parent[path[-1]]
    elif isinstance(parent, dict):
        parent[pick(rng, ("x", "", "rows", "__class__", "a" * 1000))] = pick(rng, HOSTILE)
    else:
        parent.append(parent[path[-1]])
    files[META] = json.dumps(facts).encode("utf-8", "surrogatepass")


def text(rng, files):
    """What no JSON writer would write."""
    data = files[META].decode()
    at = data.index("{") + 1
    deep = int(pick(rng, (200, 2000, 100_000, 2_000_000)))
    big = checkpoint.LARGEST_TEXT
    files[META] = pick(
        rng,
        (
            lambda: data[:at] + '"step": 3,' + data[at:],
            lambda: data[:at] + '"x": ' + "9" * int(pick(rng, (101, 5000, 1_000_000))) + "," + data[at:],
            lambda: data[:at] + '"x": 1e999,' + data[at:],
            lambda: data[:at] + '"x": NaN,' + data[at:],
            lambda: data[:at] + '"x": ' + "[" * deep + "]" * deep + "," + data[at:],
            lambda: '{"a":' * deep,
            lambda: "[" * deep,
            lambda: "\ufeff" + data,
            lambda: data + data,
            lambda: "",
            lambda: pick(rng, ("null", "5", "[]", '"a"', "{}", "true")),
            lambda: data.replace("1", "2", int(rng.integers(1, 5))),
            lambda: data.replace('"', "'", 1),
            lambda: data[:at] + '"x": [' + "[]," * (big // 3 - 2000) + "[]]," + data[at:],
            lambda: data[:at] + '"x": "' + "a" * big + '",' + data[at:],
            lambda: data[:at] + f'"format": {pick(rng, (2, 3, 10**9))},' + data[at:].replace('"format": 1', '"y": 1'),
        ),
    )().encode()


# ---- the file system ----------------------------------------------------------------------------------------------

REMOVE, FOLDER, PIPE, ZEROS, LOOP, SPARSE = "remove", "folder", "pipe", "zeros", "loop", "sparse"


def strange_file(rng, files):
    files[any_file(rng, files)] = pick(rng, (REMOVE, FOLDER, PIPE, ZEROS, LOOP, SPARSE))


def put(folder, files):
    """Writes them into an empty folder."""
    for name, data in files.items():
        path = os.path.join(folder, name)
        if isinstance(data, bytes):
            with open(path, "wb") as file:
                file.write(data)
        elif data == FOLDER:
            os.mkdir(path)
        elif data == PIPE:
            os.mkfifo(path)
        elif data in (ZEROS, LOOP):
            os.symlink("/dev/zero" if data == ZEROS else path, path)
        elif data == SPARSE:
            with open(path, "wb") as file:
                file.truncate(1 << 40)


def seal(files):
    """True where the checksums could be made to fit what the files hold."""
    try:
        facts = json.loads(files[META])
        for name, about in facts["files"].items():
            data = files[name]
            about["bytes"], about["sha256"] = len(data), hashlib.sha256(data).hexdigest()
        facts.pop("checksum", None)
        facts["checksum"] = checkpoint._checksum(facts)
        files[META] = json.dumps(facts, separators=(",", ":")).encode()
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return False
    return True


CHECKPOINT = {
    **{name: of_bytes(change) for name, change in BYTES.items()},
    "swap files": swap_files, "swap tensors": swap_tensors, "reshape": on_tensor(reshape), "retype": on_tensor(retype),
    "poison": on_tensor(poison), "reorder": on_tensor(reorder), "longer": on_tensor(longer), "drop": drop_tensor,
    "rename": rename_tensor, "header size": header_size, "header": header, "fact": fact, "text": text,
    "strange file": strange_file,
}  # fmt: skip


# ---- configurations -----------------------------------------------------------------------------------------------

WORDS = (
    "nan", "inf", "-1", "0", "1e400", "2147483648", "0x" + "f" * 4000, "9" * 4000, "true", '""', "[]", "{}", "[1.0]",
    "[30.0, 1.0]", "1979-05-27", "07:32:00", "'a'", '"\\ud800"', "[" * 1000 + "]" * 1000, "{a = 1}", "1.5",
    '"' + "a" * 3000 + '"', "[nan, 1.0]", '"embedding"', '"drive"', "96", "-0.0", "1e-320", "0.5", "1_000",
    ".".join("a" * 1000),
)  # fmt: skip


def toml(rng, data):
    """A configuration's bytes, changed line by line or byte by byte."""
    lines = data.decode().splitlines()
    at = rng.integers(len(lines))
    key = lines[at].split("=")[0] if "=" in lines[at] else "dim "
    choice = rng.integers(12)
    if choice < 5:
        lines[at] = f"{key}= {pick(rng, WORDS)}"
    elif choice == 5:
        del lines[at]
    elif choice == 6:
        dotted = ".".join("a" * 2000) + "=1"
        lines.insert(at, pick(rng, ("x = 1", "[x]", "[[x]]", "[regions]", "=", "]", "\0", '"', dotted)))
    elif choice == 7:
        lines.insert(int(rng.integers(len(lines))), lines[at])
    elif choice == 8:
        other = rng.integers(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif choice == 9:
        return (data * 300)[: int(rng.integers(1, 600_000))]
    elif choice == 10:
        some = int(rng.integers(2, 4000))
        more = (f'[[regions]]\nname = "r{i}"\nneurons = 32\nlevel = {i}\n' for i in range(some))
        return data + "".join(more).encode()
    else:
        return pick(rng, tuple(BYTES.values()))(rng, data)
    return "\n".join(lines).encode()
