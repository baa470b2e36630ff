"""A file enters the hub's cache only when it is complete and has the hash that the hub lists."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors.torch import save

from affectlens.checkpoints import open_checkpoint
from affectlens.checkpoints.hub import remote
from affectlens.checkpoints.hub.downloading import download
from affectlens.checkpoints.hub.listing import cached, hub_files
from affectlens.errors import CheckpointError, WriteError
from tests.checkpoints.hub.hub_server import Hub, posing

CONFIG = b'{"model_type": "llama"}'
WEIGHTS = save({"model.norm.weight": torch.arange(400_000, dtype=torch.float32)})
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "sub/more.json": b"{}"}

# what goes wrong, where → what is said
FAULTS = (
    ("stall", "cdn", "gave up after"),
    ("trickle", "cdn", "gave up after"),
    ("reset", "cdn", "gave up after"),
    ("500", "cdn", "gave up after"),
    ("size", "cdn", "changed while it was read"),
    ("more", "cdn", "received more bytes than the hub lists"),
    ("turned", "cdn", "the hash of the downloaded file is not the one that the hub lists"),
    ("turned", "resolve", "the hash of the downloaded file is not the one that the hub lists"),
    ("stall", "resolve", "gave up after"),
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Run a hub for a test; faults that stay are given up soon."""
    with posing(monkeypatch, cache=tmp_path / "cache") as server:
        server.push("lab/tiny", FILES)
        monkeypatch.setattr(remote, "PATIENCE", 0.5)
        monkeypatch.setattr(remote, "ATTEMPT", 0.2)
        yield server


def everything() -> list[str]:
    """Return all files of the cache."""
    return sorted(str(path) for path in Path(constants.HF_HUB_CACHE).rglob("*") if not path.is_dir())


def test_files_lie_where_the_hub_keeps_them(hub: Hub) -> None:
    """Any tool of the hub finds a downloaded file, under the branch and the commit."""
    listing = hub_files("lab/tiny")
    folder = download(listing, FILES)

    assert FILES == {name: (folder / name).read_bytes() for name in FILES}
    assert str(folder / "config.json") == try_to_load_from_cache("lab/tiny", "config.json")
    assert folder == cached("lab/tiny") == cached(listing.source)
    assert all(path.is_symlink() for path in folder.glob("*.*"))


def test_nothing_is_fetched_twice(hub: Hub) -> None:
    """A file in the cache is not downloaded again, also for another commit that has it."""
    download(hub_files("lab/tiny"), FILES)
    hub.push("lab/tiny", {**FILES, "config.json": b"{}"})
    before = dict(hub.sent)
    folder = download(hub_files("lab/tiny"), FILES)

    assert b"{}" == (folder / "config.json").read_bytes()
    assert before["model.safetensors"] == hub.sent["model.safetensors"]


@pytest.mark.parametrize(("kind", "at", "message"), FAULTS)
def test_nothing_half_fetched_counts(hub: Hub, kind: str, at: str, message: str) -> None:
    """A lasting fault ends in a clear error in time, leaves no file, and the next try succeeds."""
    listing = hub_files("lab/tiny")
    hub.fail(kind, at=at, times=99, after=7)
    began = time.monotonic()

    with pytest.raises(CheckpointError, match=message):
        download(listing, FILES)
    assert 4 > time.monotonic() - began
    for path in everything():
        assert "/.model" not in path
        assert Path(path).read_bytes() in FILES.values()
    assert cached("lab/tiny") is None

    hub.faults.clear()
    assert WEIGHTS == (download(listing, FILES) / "model.safetensors").read_bytes()


def test_a_cache_that_can_not_be_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that can't be written to is an error that names it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))

    with pytest.raises(WriteError, match=r"models--lab--tiny/.*: can't be written .Not a directory"):
        download(hub_files("lab/tiny"), FILES)


def test_files_of_torch_and_adapters_are_fetched_with_the_same_patience(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch files and adapters are downloaded first; a hub that stalls then ends in the same error."""
    torch.save({"model.norm.weight": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    weights = (tmp_path / "pytorch_model.bin").read_bytes()
    hub.push("lab/bin", {"config.json": CONFIG, "pytorch_model.bin": weights, "big.h5": b"x" * 99})
    hub.fail("stall", at="resolve", times=99)
    with pytest.raises(CheckpointError, match="gave up after"):
        open_checkpoint("lab/bin")
    hub.faults.clear()

    assert 3 == open_checkpoint("lab/bin").parameters
    assert "big.h5" not in hub.sent
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert 3 == open_checkpoint("lab/bin").parameters


def test_a_revision_names_no_path(hub: Hub) -> None:
    """A branch is recorded below the cache's own folder, or not at all."""
    commit = hub.push("lab/tiny", FILES, to="../../../../../out")
    folder = download(hub_files("lab/tiny"), ["config.json"], revision="../../../../../out")

    assert commit == folder.name
    assert not list(Path(constants.HF_HUB_CACHE).parent.glob("out"))
