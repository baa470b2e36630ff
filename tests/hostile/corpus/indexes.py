"""Indexes that lead out of the folder, to no file or to another tensor, and shards that disagree."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.hostile.case import Case
from tests.hostile.writing import GATE, index, packed, sharded, values, write

_FIRST, _SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_INDEX = "model.safetensors.index.json"

# name of a shard → what must be said
_SHARDS: tuple[tuple[str, str, str], ...] = (
    ("parent folder", "../model.safetensors", "outside the folder"),
    ("a folder beside", "../outside/model.safetensors", "outside the folder"),
    ("absolute path", "/etc/passwd", "outside the folder"),
    ("device", "/dev/zero", "outside the folder"),
    ("backslashes", "..\\outside\\model.safetensors", "outside the folder"),
    ("drive", "C:model.safetensors", "outside the folder"),
    ("address", "file:///etc/passwd", "outside the folder"),
    ("web address", "https://example.com/model.safetensors", "outside the folder"),
    ("folder below", "sub/model.safetensors", "outside the folder"),
    ("dot", ".", "outside the folder"),
    ("two dots", "..", "outside the folder"),
    ("nothing", "", "outside the folder"),
    ("NUL", "model\0.safetensors", "an invalid name"),
    ("half a surrogate pair", "model\ud800.safetensors", "an invalid name"),
    ("100 kB", "m" * 100_000 + ".safetensors", "mmm.safetensors: the index names this shard"),
    ("colours and lines", "\x1b[31m\n\u202emodel.safetensors", "model.safetensors"),
    ("missing", "other.safetensors", "other.safetensors: the index names this shard, but it is missing"),
    ("home", "~.safetensors", "missing"),
    ("variable", "$HOME.safetensors", "missing"),
    ("pattern", "*.safetensors", "missing"),
    ("pickle", "pytorch_model.bin", "not a .safetensors file"),
    ("config", "config.json", "not a .safetensors file"),
    ("itself", _INDEX, "not a .safetensors file"),
)

# text of the index → what must be said
_TEXTS: tuple[tuple[str, str, str], ...] = (
    ("tensor twice", f'{{"weight_map":{{"a":"{_FIRST}","a":"{_SECOND}"}}}}', "tensor 'a'"),
    ("map twice", f'{{"weight_map":{{"a":"{_FIRST}"}},"weight_map":{{"a":"{_SECOND}"}}}}',
     "'weight_map' twice"),
    ("no JSON", "{", "not valid JSON"),
    ("byte order mark", '\ufeff{"weight_map":{}}', "not valid JSON"),
    ("brackets", "[" * 100_000, "not valid JSON"),
    ("number of 5,000 digits", f'{{"metadata":{{"total_size":{"9" * 5000}}},"weight_map":{{}}}}',
     "not valid JSON"),
    ("list", "[]", "not a JSON object"),
    ("no map", "{}", "no weight_map"),
    ("map is a list", '{"weight_map":["a"]}', "no weight_map"),
    ("map to numbers", '{"weight_map":{"a":1}}', "no weight_map"),
    ("map to null", '{"weight_map":{"a":null}}', "no weight_map"),
    ("empty map", '{"weight_map":{}}', "lists no tensor"),
    ("web page", "<!DOCTYPE html><html></html>", "not valid JSON"),
    ("pointer", "version https://git-lfs.github.com/spec/v1\n", "not valid JSON"),
    ("too many values", '{"weight_map":{},"x":[' + "0," * 2_100_000 + "0]}",
     "more than 2,000,000 values"),
)  # fmt: skip


def _named(root: Path, *, shard: str) -> list[str]:
    folder = root / "input"
    sharded(folder)
    index(folder, {GATE: shard})
    return ["inspect", str(folder)]


def _written(root: Path, *, text: str) -> list[str]:
    folder = root / "input"
    sharded(folder)
    index(folder, text)
    return ["inspect", str(folder)]


def _altered(root: Path, *, change: Callable[[Path, Path], object]) -> list[str]:
    """Change a folder's shards or what leads to them; `change` gets this folder and the one outside."""
    folder = root / "input"
    sharded(folder)
    change(folder, root / "outside")
    return ["inspect", str(folder)]


def _replace(folder: Path, name: str, target: Path | str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def _pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def _directory(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def _large(folder: Path, outside: Path) -> None:
    """Make the index a sparse file of a terabyte."""
    os.truncate(folder / _INDEX, 2**40)


def _lost(folder: Path, outside: Path) -> None:
    weights = json.loads((folder / _INDEX).read_text())["weight_map"]
    index(folder, {**weights, "lost.weight": _FIRST})


def _many_shards(folder: Path, outside: Path) -> None:
    index(folder, {f"t{number}": f"{number}.safetensors" for number in range(100_000)})


# name, what is done to the folder, what must be said
_CHANGES: tuple[tuple[str, Callable[[Path, Path], object], str], ...] = (
    ("shard links outside", lambda f, o: _replace(f, _FIRST, o / "model.safetensors"),
     f"{_FIRST}: links to a"),
    ("shard links outside by a way", lambda f, o: _replace(f, _FIRST, "../outside/shard.safetensors"),
     "links to a"),
    ("shard links to a pipe", lambda f, o: _replace(f, _FIRST, o / "pipe"), "links to a file outside"),
    ("shard links to a device", lambda f, o: _replace(f, _FIRST, "/dev/zero"), "links to a file outside"),
    ("shard links to itself", lambda f, o: _replace(f, _FIRST, _FIRST), f"{_FIRST}: can't be opened"),
    ("shards link in a ring", lambda f, o: (_replace(f, _FIRST, _SECOND), _replace(f, _SECOND, _FIRST)),
     "can't be"),
    ("shard links to nothing", lambda f, o: _replace(f, _FIRST, "gone.safetensors"),
     f"{_FIRST}: links to nothing"),
    ("shard is a pipe", lambda f, o: _pipe(f, _FIRST), f"{_FIRST}: this is not an ordinary file"),
    ("shard is a folder", lambda f, o: _directory(f, _SECOND), f"{_SECOND}: this is not an ordinary file"),
    ("shard is empty", lambda f, o: (f / _SECOND).write_bytes(b""), f"{_SECOND}: this file is empty"),
    ("shard is a pointer", lambda f,
     o: (f / _SECOND).write_text("version https://git-lfs.github.com/spec/v1\n"),
     f"{_SECOND}: this is a Git LFS pointer"),
    ("shard is cut short", lambda f, o: os.truncate(f / _SECOND, 700), f"{_SECOND}: the header claims"),
    ("shard is gone", lambda f, o: (f / _SECOND).unlink(), f"{_SECOND}: the index names this shard"),
    ("all shards are gone", lambda f, o: [(f / n).unlink() for n in (_FIRST, _SECOND)], "but it is missing"),
    ("tensor is in no shard", _lost, "tensor 'lost.weight': no shard holds"),
    ("100,000 shards", _many_shards, "missing"),
    ("index links outside", lambda f, o: _replace(f, _INDEX, o / "config.json"),
     f"{_INDEX}: links to a file outside"),
    ("index is a pipe", lambda f, o: _pipe(f, _INDEX), f"{_INDEX}: this is not an ordinary file"),
    ("index is a folder", lambda f, o: _directory(f, _INDEX), f"{_INDEX}: this is not an ordinary file"),
    ("index links to nothing", lambda f, o: _replace(f, _INDEX, "gone.json"), f"{_INDEX}: links to nothing"),
    ("index of a terabyte", _large, f"{_INDEX}: larger than"),
    ("config links outside", lambda f, o: _replace(f, "config.json", o / "config.json"),
     "config.json: links to a"),
    ("config is a pipe", lambda f, o: _pipe(f, "config.json"), "config.json: this is not an ordinary file"),
    ("config is a device", lambda f, o: _replace(f, "config.json", "/dev/zero"),
     "config.json: links to a file"),
    ("config links to nothing", lambda f, o: _replace(f, "config.json", "gone"),
     "config.json: links to nothing"),
    ("config is a folder", lambda f, o: _directory(f, "config.json"),
     "config.json: this is not an ordinary file"),
)  # fmt: skip


def _twice(root: Path, *, verb: str, named: str) -> list[str]:
    """Write a tensor into both shards; the index places it in `named`."""
    for side in ("base", "tuned"):
        folder, found = root / side, values(seed=int(side == "tuned"))
        weights = sharded(folder, seed=int(side == "tuned"))
        second = {name: value for name, value in found.items() if weights[name] == _SECOND}
        if side == "tuned" or verb == "inspect":
            write(folder / _SECOND, *packed({**second, GATE: 1000 * found[GATE]}))
            index(folder, {name: file for name, file in {**weights, GATE: named}.items() if file})
    return [verb, *(str(root / side) for side in ("base", "tuned")[: 1 + (verb == "diff")])]


def _swapped(root: Path) -> list[str]:
    """Write an index that has each tensor in the other file."""
    folder = root / "input"
    weights = sharded(folder)
    index(folder, {name: _SECOND if file == _FIRST else _FIRST for name, file in weights.items()})
    return ["inspect", str(folder)]


def _one_file_twice(root: Path) -> list[str]:
    """Link one shard to the other, within the folder."""
    folder = root / "input"
    weights = sharded(folder)
    _replace(folder, _SECOND, _FIRST)
    index(folder, {name: _FIRST for name, file in weights.items() if file == _FIRST} | {GATE: _SECOND})
    return ["inspect", str(folder)]


def _pickles_index(root: Path) -> list[str]:
    folder = root / "input"
    weights = sharded(folder)
    (folder / _INDEX).unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))
    return ["inspect", str(folder)]


def _beside_a_whole(root: Path) -> list[str]:
    folder = root / "input"
    sharded(folder)
    write(folder / "model.safetensors", *packed({GATE: values()[GATE]}))
    return ["inspect", str(folder)]


CASES: tuple[Case, ...] = (
    *(
        Case(f"index names: {name}", "index", partial(_named, shard=shard), "refused", (says,))
        for name, shard, says in _SHARDS
    ),
    *(
        Case(f"index text: {name}", "index", partial(_written, text=text), "refused", (_INDEX, says))
        for name, text, says in _TEXTS
    ),
    *(
        Case(f"folder: {name}", "shards", partial(_altered, change=change), "refused", (says,))
        for name, change, says in _CHANGES
    ),
    Case(
        "shards: a tensor in two",
        "shards",
        partial(_twice, verb="inspect", named=_FIRST),
        "told",
        ("1 tensors are skipped", "second copy", f"{GATE} in {_SECOND}"),
    ),
    Case(
        "shards: a tensor in two, in a diff",
        "shards",
        partial(_twice, verb="diff", named=_FIRST),
        "told",
        ("skipped", "second copy", f"{GATE} in {_SECOND}", "128"),
    ),
    Case(
        "shards: a tensor in two, and the index silent",
        "shards",
        partial(_twice, verb="inspect", named=""),
        "refused",
        (f"tensor '{GATE}'", _FIRST, _SECOND, "no index says which"),
    ),
    Case(
        "shards: other files than the index says",
        "shards",
        _swapped,
        "told",
        ("16 tensors are in other files than the index says",),
    ),
    Case(
        "shards: one file twice", "shards", _one_file_twice, "told", ("8 tensors are skipped", "second copy")
    ),
    Case(
        "index names: safetensors in one of pickles",
        "index",
        _pickles_index,
        "refused",
        ("pytorch_model.bin.index.json", "which is not a .bin"),
    ),
    Case("folder: a whole file beside shards", "shards", _beside_a_whole, "told", ("index.json", "not read")),
)
