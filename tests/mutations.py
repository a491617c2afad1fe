"""Random damage to folders: bytes, JSON values and whole files; everything comes from the generator given."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

# Texts that a JSON value is replaced by, as they stand in the file: some are no JSON.
TEXTS = (
    "0", "1", "-1", "2", "3", "8", "1000000000", "1000000000000000", "-9223372036854775809", "1" + "0" * 400,
    "1" * 5000, "0.5", "1.0", "2.5", "-1e-9", "1e308", "1e999", "NaN", "Infinity", "-Infinity", "null", "true", "false",
    '""', '"0"', '"x"', '"봄"', r'"\ud800"', r'"a\nb"', r'"\u0000"', '"../x"', '"' + "y" * 300 + '"', "[]", "{}", "[0]",
    "[[]]", '[null, "x", -1]', '{"x": 1}', "[" * 300 + "]" * 300, "[" * 960 + "]" * 960, "[" * 100_000,
    '{"x":' * 200 + "1" + "}" * 200, "01", "'x'", "",
)  # fmt: skip
MARK = "the value to be replaced"


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage a folder in one place, now and then in two or three; says what was done."""
    return "; ".join(_mutate(folder, rng) for _ in range(rng.choice((1, 1, 1, 1, 2, 3))))


def _mutate(folder: Path, rng: random.Random) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        return "nothing is left"
    texts = [file for file in files if file.suffix in (".json", ".yml")]
    headed = [file for file in files if file.suffix == ".safetensors"]
    kind = rng.choice(("bytes", "bytes", "json", "json", "file"))
    if kind == "json" and (texts or headed):
        # config.json and an index decide more than a long tokenizer.json.
        weights = [1 if file.name == "tokenizer.json" else 3 for file in texts + headed]
        file = rng.choices(texts + headed, weights)[0]
        how = _mutate_header(file, rng) if file in headed else _mutate_json(file, rng)
        return f"{file.relative_to(folder)}: {how}"
    file = rng.choice(texts if texts and rng.random() < 0.2 else files)
    how = _mutate_file(file, rng.choice(files), rng) if kind == "file" else _mutate_bytes(file, rng)
    return f"{file.relative_to(folder)}: {how}"


def _mutate_bytes(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    at = _place(len(content), rng)
    length = rng.choice((1, 2, 7, 8, 100, 1000))
    some = bytes(content[at : at + length])
    kind = rng.choice(("flip a bit of", "set", "cut from", "cut", "repeat", "insert", "fill with zeros"))
    if kind == "flip a bit of" and content:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "set" and content:
        content[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, *b'"{}[],:0 9'))
    elif kind == "cut from":
        del content[at:]
    elif kind == "cut":
        del content[at : at + length]
    elif kind == "repeat":
        content[at:at] = some
    elif kind == "insert":
        content[at:at] = rng.randbytes(length)
    else:
        content[at : at + length] = bytes(len(some))
    file.write_bytes(content)
    return f"{kind} byte {at} ({length})"


def _place(size: int, rng: random.Random) -> int:
    """A position in a file; its first and last bytes, where headers and directories are, come up more often."""
    if size == 0:
        return 0
    start, stop = rng.choice(((0, 8), (0, 2000), (size - 600, size), (0, size), (0, size)))
    return rng.randrange(max(start, 0), min(stop, size))


def _mutate_file(file: Path, other: Path, rng: random.Random) -> str:
    kind = rng.choice(("delete", "swap with", "copy to", "copy beside", "empty", "make a folder of", "fill with noise"))
    content = file.read_bytes()
    if kind == "delete":
        file.unlink()
    elif kind == "swap with":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "copy to":
        shutil.copyfile(file, other) if other != file else None
    elif kind == "copy beside":
        name = rng.choice(("tokenizer.json", "manifest.ocdbt", "model.safetensors", "pytorch_model.bin", "config.json",
                           "0", "zarr.json", "_sharding", f"copy{file.suffix}"))  # fmt: skip
        if not (file.parent / name).is_dir():  # as an earlier damage may have left it
            (file.parent / name).write_bytes(content)
        return f"copy to {name}"
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "make a folder of":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(rng.randbytes(len(content)))
    return f"{kind} ({other.name})"


def _mutate_json(file: Path, rng: random.Random) -> str:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return _mutate_bytes(file, rng)
    text, how = mutated_text(value, rng)
    file.write_text(text, encoding="utf-8")
    return how


def _mutate_header(file: Path, rng: random.Random) -> str:
    """Change a value in the JSON at the front of a safetensors file, and its length with it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        value = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return _mutate_bytes(file, rng)
    text, how = mutated_text(value, rng)
    header = text.encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return f"header: {how}"


def mutated_text(value: Any, rng: random.Random) -> tuple[str, str]:
    """The text of a JSON value with one value in it replaced, deleted, renamed, repeated or changed slightly."""
    *path, last = _path(value, rng)
    if last is None:
        return (text := rng.choice(TEXTS)), f"all of it = {text[:20]}"
    parent = value
    for key in path:
        parent = parent[key]
    old, where = parent[last], "/".join(map(str, [*path, last]))
    kind = rng.choice(("replace", "replace", "replace", "near", "delete", "rename", "repeat", "swap"))
    if kind == "near" and type(old) in (int, float) and abs(old) < 1e300:
        parent[last] = rng.choice((old + 1, old - 1, old * 2, -old, float(old), str(old), [old]))
        return json.dumps(value), f"{where} = {parent[last]!r}"
    if kind == "delete":
        del parent[last]
        return json.dumps(value), f"delete {where}"
    if kind in ("rename", "repeat") and isinstance(parent, dict):
        new = rng.choice((f"{last}x", "", "\ud800", "a\nb", "model_type", "__metadata__", *parent))
        parent[new] = parent.pop(last) if kind == "rename" else old
        return json.dumps(value), f"{kind} {where} as {new!r}"
    if kind == "swap":
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[last], parent[other] = parent[other], parent[last]
        return json.dumps(value), f"swap {where} and {other}"
    parent[last] = MARK
    text = rng.choice(TEXTS)
    return json.dumps(value).replace(json.dumps(MARK), text), f"{where} = {text[:20]}"


def _path(value: Any, rng: random.Random) -> list[Any]:
    """Keys that lead to a value inside; [None] is the whole."""
    path: list[Any] = []
    while isinstance(value, (dict, list)) and value and (not path or rng.random() < 0.8):
        path.append(rng.choice(list(value) if isinstance(value, dict) else range(len(value))))
        value = value[path[-1]]
    return path if path and rng.random() < 0.97 else [None]
