"""Every layout of a model on disk opens, and anything else is a clear error."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import affectlens as al
from affectlens.errors import CheckpointError

# first bytes of what people find under the name .safetensors → what the error says it is
IMPOSTORS = (
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b"<!DOCTYPE html><html></html>", "web page"),
    (b"PK\x03\x04 and so on", "zip archive"),
    (b"\x80\x02}q\x00.", "pickle"),
    (b"\x1f\x8b\x08 and so on", "gzip"),
    (b"GGUF\x03\x00\x00\x00", "GGUF"),
    (b"abc", "too short"),
    (b"\xff" * 64, "the header claims"),
)

# a header that is wrong → what the error says
HEADERS = (
    ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
     "named twice"),
    ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "4 bytes for shape"),
    ('{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}', "unknown dtype"),
    ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "whole numbers"),
    ('{"a":{"dtype":"F32","shape":[1]}}', "lacks dtype"),
    ('{"a":{"dtype":"F32","shape":[0],"data_offsets":[2,2]}}', "hole"),
    ('{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', "the tensors need 3 bytes"),
    ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
     "overlaps"),
    ("[]", "not a JSON object"),
    ("{", "not valid JSON"),
)  # fmt: skip


@pytest.fixture
def folder(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return a sharded checkpoint to break."""
    return Path(shutil.copytree(pair[1], tmp_path / "broken"))


def test_shards_and_one_file_are_the_same(pair: tuple[Path, Path], save: Callable[..., Path]) -> None:
    """A checkpoint in one file equals the same one in shards, tensor by tensor."""
    whole, shards = al.open_checkpoint(pair[0]), al.open_checkpoint(pair[1])

    assert 1 < shards.identity["files"]
    assert whole.sites == shards.sites
    assert whole.parameters == shards.parameters
    changed = [site for site in whole.sites if not torch.equal(whole.read(site), shards.read(site))]
    assert {"language"} == {site.tower for site in changed}


def test_a_single_file_opens(pair: tuple[Path, Path]) -> None:
    """Opening the file alone equals opening the folder, config included."""
    assert al.open_checkpoint(pair[0]).sites == al.open_checkpoint(pair[0] / "model.safetensors").sites


def test_identity_holds_no_path(pair: tuple[Path, Path]) -> None:
    """The identity in results names the folder, without its path."""
    assert str(pair[0].parent) not in json.dumps(al.open_checkpoint(pair[0]).identity)


@pytest.mark.parametrize(("content", "message"), IMPOSTORS)
def test_impostors(content: bytes, message: str, tmp_path: Path) -> None:
    """A file of another format is an error that names the format."""
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(CheckpointError, match=message):
        al.open_checkpoint(tmp_path)


@pytest.mark.parametrize(("header", "message"), HEADERS)
def test_broken_headers(header: str, message: str, tmp_path: Path) -> None:
    """A header that two readers could read differently is refused."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0\0\0\0")

    with pytest.raises(CheckpointError, match=message):
        al.open_checkpoint(file)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_can_not_name_files_elsewhere(name: str, folder: Path) -> None:
    """An index can only name files in its own folder."""
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))

    with pytest.raises(CheckpointError, match="outside the folder"):
        al.open_checkpoint(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, pair: tuple[Path, Path]) -> None:
    """A shard that links out of the folder is refused."""
    shard = next(folder.glob("model-*.safetensors"))
    shard.unlink()
    shard.symlink_to(pair[0] / "model.safetensors")

    with pytest.raises(CheckpointError, match="links to a file outside"):
        al.open_checkpoint(folder)


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    """A named pipe under the name of a checkpoint is an error at once."""
    os.mkfifo(tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match="not an ordinary file"):
        al.open_checkpoint(tmp_path)


def test_an_index_that_names_a_tensor_no_shard_holds_is_refused(folder: Path) -> None:
    """A tensor of the index that no shard has is an error: the checkpoint is incomplete."""
    index = folder / "model.safetensors.index.json"
    entries = json.loads(index.read_text("utf-8"))
    entries["weight_map"]["lost.weight"] = next(iter(entries["weight_map"].values()))
    index.write_text(json.dumps(entries), "utf-8")

    with pytest.raises(CheckpointError, match=r"tensor 'lost.weight': no shard holds this tensor"):
        al.open_checkpoint(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    """The error names the missing file of the index."""
    shard = next(folder.glob("model-*.safetensors"))
    shard.unlink()

    with pytest.raises(CheckpointError, match=f"{shard.name}: the index names this shard"):
        al.open_checkpoint(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/place", "no such file or folder"),
        (42, "is not a path"),
        ("", "no such file or folder|no checkpoint"),
    ],
)
def test_what_is_no_checkpoint(source: object, message: str) -> None:
    """A wrong path or object is an error that says so."""
    with pytest.raises(CheckpointError, match=message):
        al.open_checkpoint(source)  # type: ignore[arg-type]


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    """The error names the files of a checkpoint, and the files that are there."""
    (tmp_path / "notes.txt").touch()

    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .*In it: notes.txt"):
        al.open_checkpoint(tmp_path)


def test_a_hub_id_is_found_in_the_hubs_own_cache(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network too; the cache's links into its blobs are followed."""
    cache = tmp_path / "models--owner--name"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in pair[1].iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (cache / "refs").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    found = al.open_checkpoint("owner/name@abc")

    assert ("owner/name@abc", "abc") == (found.identity["name"], found.identity["revision"])
    assert al.open_checkpoint(pair[1]).sites == found.sites


def test_content_hash_tells_base_from_tuned(pair: tuple[Path, Path]) -> None:
    """Two checkpoints with equal headers differ in their content hash."""
    one, two = (al.open_checkpoint(side).identity["content_sha256"] for side in pair)

    assert one != two
