"""Pipes, devices, links and odd names in the place of a file or folder."""

import json
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.hostile.case import Case
from tests.hostile.writing import model, packed, values, write

_FILE = "model.safetensors"


def _made(root: Path, *, make: Callable[[Path, Path], Path | str]) -> list[str]:
    """Inspect the path that `make` returns, given the input folder and the one outside."""
    folder = root / "input"
    folder.mkdir()
    return ["inspect", str(make(folder, root / "outside"))]


def _pipe(folder: Path, outside: Path, *, name: str) -> Path:
    os.mkfifo(folder / name)
    return folder


def _socket(folder: Path, outside: Path) -> Path:
    bound = socket.socket(socket.AF_UNIX)
    before = Path.cwd()
    os.chdir(folder)  # the path of a socket may have a hundred characters
    try:
        bound.bind(_FILE)
    finally:
        os.chdir(before)
        bound.close()
    return folder


def _directory(folder: Path, outside: Path) -> Path:
    (folder / _FILE).mkdir()
    return folder


def _link(folder: Path, outside: Path, *, target: str, name: str = _FILE) -> Path:
    (folder / name).symlink_to(outside / target)
    return folder


def _unreadable(folder: Path, outside: Path) -> Path:
    model(folder)
    (folder / _FILE).chmod(0)
    return folder


def _files(folder: Path, outside: Path, *, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def _weights(folder: Path, outside: Path, *, names: tuple[str, ...]) -> Path:
    for name in names:
        write(folder / name, *packed(values()))
    return folder


def _adapter_alone(folder: Path, outside: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    return folder


def _adapter_links(folder: Path, outside: Path) -> Path:
    write(
        folder / "adapter_model.safetensors",
        *packed({"base_model.model.x.lora_A.weight": values()["model.norm.weight"]}),
    )
    return _link(folder, outside, target="adapter_config.json", name="adapter_config.json")


def _adapter_pipe(folder: Path, outside: Path) -> Path:
    write(folder / "adapter_model.safetensors", *packed({"a": values()["model.norm.weight"]}))
    return _pipe(folder, outside, name="adapter_config.json")


def _false_cache(folder: Path, outside: Path) -> Path:
    """Write what looks like a snapshot of the hub's cache, but links into a folder beside it."""
    snapshot, blobs = folder / "snapshots" / "main", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.symlink_to(outside)
    (snapshot / _FILE).symlink_to("../../blobs/model.safetensors")
    return snapshot


def _possible(name: str) -> bool:
    """Return whether the system allows such file names: macOS refuses invalid Unicode."""
    return sys.platform == "linux" or "no text" not in name


# name, how it is made, what must be said
_REFUSED: tuple[tuple[str, Callable[[Path, Path], Path | str], str], ...] = (
    ("pipe", partial(_pipe, name=_FILE), f"{_FILE}: this is not an ordinary file"),
    ("pipe as .bin", partial(_pipe, name="pytorch_model.bin"),
     "pytorch_model.bin: this is not an ordinary file"),
    ("pipe of another name", partial(_pipe, name="w.pth"), "w.pth: this is not an ordinary file"),
    ("pipe itself", lambda f, o: _pipe(f, o, name="p") / "p", "p: this is not an ordinary file"),
    ("socket", _socket, f"{_FILE}: this is not an ordinary file"),
    ("folder for a file", _directory, f"{_FILE}: this is not an ordinary file"),
    ("link outside", partial(_link, target=_FILE), f"{_FILE}: links to a file outside"),
    ("link to a secret", partial(_link, target="secret.txt", name="pytorch_model.bin"),
     "links to a file outside"),
    ("link of another name", partial(_link, target=_FILE, name="w.safetensors"),
     "w.safetensors: links to a file"),
    ("link to a pipe", partial(_link, target="pipe"), f"{_FILE}: links to a file outside"),
    ("link to a device", partial(_link, target="/dev/zero"), f"{_FILE}: links to a file outside"),
    ("link to itself", lambda f, o: _link(f, f, target=_FILE), f"{_FILE}: can't be opened"),
    ("link to nothing", lambda f, o: _link(f, f, target="gone"), f"{_FILE}: links to nothing"),
    ("link to nothing itself", lambda f, o: _link(f, f, target="gone") / _FILE, f"{_FILE}: links to nothing"),
    ("link to itself, itself", lambda f, o: _link(f, f, target=_FILE) / _FILE, f"{_FILE}: can't be opened"),
    ("device itself", lambda f, o: "/dev/zero", "/dev/zero: this is not an ordinary file"),
    ("nothing of such a name", lambda f, o: f / "gone", "there is no such file or folder"),
    ("name of 5,000 characters", lambda f, o: f / ("x" * 5000), "there is no such file or folder"),
    ("file for a folder", lambda f, o: write(f / _FILE, "{}") / "config.json",
     "there is no such file or folder"),
    ("empty folder", lambda f, o: f, "In it: nothing"),
    ("optimizer alone", partial(_files, names=("optimizer.pt", "training_args.bin")), "In it: optimizer.pt"),
    ("other case", partial(_files, names=("MODEL.SAFETENSORS",)), "In it: MODEL.SAFETENSORS"),
    ("name of lines and colours", partial(_files, names=("a\n\x1b[2Jb\u202e.txt",)), "In it: a�"),
    ("name of no text", partial(_files, names=(os.fsdecode(b"\xff\xfe.txt"),)), "In it: ��.txt"),
    ("broken under a wild name", partial(_files, names=("a\n\x1b[2Jb\u202e.safetensors",)),
     ".safetensors: only 1 bytes"),
    ("broken under a name of no text", partial(_files, names=(os.fsdecode(b"\xff.safetensors"),)),
     "�.safetensors: only"),
    ("broken under a long name", partial(_files, names=("é" * 100 + ".safetensors",)),
     "é" * 100 + ".safetensors: only"),
    ("broken under a name like an option", partial(_files, names=("--help.safetensors",)),
     "--help.safetensors: only"),
    ("two files", partial(_weights, names=("a.safetensors", "b.safetensors")),
     "2 files of weights and no index"),
    ("a thousand files", partial(_files, names=tuple(f"{n}.bin" for n in range(1000))),
     "1000 files of weights"),
    ("adapter without weights", _adapter_alone, "this adapter has no adapter_model.safetensors"),
    ("adapter's config outside", _adapter_links, "adapter_config.json: links to a file outside"),
    ("adapter's config is a pipe", _adapter_pipe, "adapter_config.json: this is not an ordinary file"),
    ("false cache", _false_cache, f"{_FILE}: links to a file outside"),
    *((("unreadable", _unreadable, f"{_FILE}: can't be opened"),) if os.getuid() else ()),
)  # fmt: skip


def _named(root: Path, *, folder: str, verb: str = "diff") -> list[str]:
    """Write a whole checkpoint into a folder of this name."""
    base, tuned = model(root / "base" / folder), model(root / "tuned" / folder, seed=1)
    return [verb, *map(str, (base, tuned)[: 1 + (verb == "diff")])]


def _both(root: Path) -> list[str]:
    folder = model(root / "input")
    write(folder / "adapter_model.safetensors", *packed(values()))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    return ["inspect", str(folder)]


def _through_a_link(root: Path) -> list[str]:
    """Name a folder by a link: the user chose it, so it opens."""
    model(root / "input" / "real")
    (root / "input" / "link").symlink_to("real")
    return ["inspect", str(root / "input" / "link")]


_TOLD: tuple[tuple[str, str, str], ...] = (
    ("lines and colours", "a\n\x1b[31mb\u202e", "a�"),
    ("no text", os.fsdecode(b"\xffmodel"), "�model"),
    ("a formula", "=cmd()", "=cmd()"),
    ("an option", "--help", "--help"),
    ("percent and braces", "%s{0}", "%s{0}"),
    ("HTML", "<script>alert(1)<", "<script>alert(1)<"),
    ("100 characters", "é" * 100, "é" * 80),
)
CASES: tuple[Case, ...] = (
    *(
        Case(f"place: {name}", "places", partial(_made, make=make), "refused", (says,))
        for name, make, says in _REFUSED
        if _possible(name)
    ),
    *(
        Case(
            f"place: a folder named with {name}",
            "places",
            partial(_named, folder=folder),
            "told",
            (says, "paired"),
        )
        for name, folder, says in _TOLD
        if _possible(name)
    ),
    Case("place: an adapter beside a model", "places", _both, "told", ("an adapter in the same folder",)),
    Case("place: through a link", "places", _through_a_link, "told", ("1,544 in 16 tensors",)),
)
