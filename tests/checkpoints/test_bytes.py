"""A file that changes while it is read is an error that says so, and never a mixed result."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import affectlens as al
from affectlens.checkpoints.bytes import LocalFile, Span
from affectlens.errors import CheckpointError
from affectlens.files import opened
from tests.hostile.writing import GATE, model, sharded, values

Change = Callable[[Path], object]


def rewritten(file: Path) -> None:
    """Write to a file in place, keeping its size and modification time."""
    state = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(b"\x7f" * 8)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def replaced(file: Path) -> None:
    """Put another file with the same bytes in its place."""
    new = file.with_name("new")
    new.write_bytes(file.read_bytes())
    new.replace(file)


CHANGES: tuple[tuple[str, Change], ...] = (
    ("rewritten", rewritten),
    ("replaced", replaced),
    ("cut short", lambda file: os.truncate(file, file.stat().st_size // 2)),
    ("grown", lambda file: os.truncate(file, file.stat().st_size + 1)),
    ("emptied", lambda file: os.truncate(file, 0)),
    ("removed", lambda file: file.unlink()),
    ("made a pipe", lambda file: (file.unlink(), os.mkfifo(file))),
)


@pytest.mark.parametrize("change", [change for _, change in CHANGES], ids=[name for name, _ in CHANGES])
def test_a_file_that_changes_during_a_diff_is_an_error(
    change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file changed after its first tensor was read is an error without a result."""
    base, tuned = model(tmp_path / "base"), model(tmp_path / "tuned", seed=1)
    file, fetch, read = tuned / "model.safetensors", LocalFile.fetch, [0]

    def meddled(self: LocalFile, start: int, stop: int, *, into: memoryview) -> memoryview:
        found = fetch(self, start, stop, into=into)
        if self.path == file:
            read[0] += 1
            if read[0] == 3:  # the two before it were those of the header
                change(file)
        return found

    monkeypatch.setattr(LocalFile, "fetch", meddled)

    with pytest.raises(
        CheckpointError, match=r"tuned/model.safetensors: (changed|vanished) while it was read"
    ):
        al.diff(base, tuned, progress=False)
    assert 3 <= read[0]


@pytest.mark.parametrize("change", [rewritten, replaced])
def test_a_shard_that_changes_after_its_header_was_read_is_an_error(change: Change, tmp_path: Path) -> None:
    """A shard changed after opening is an error: its header may not fit its values."""
    sharded(tmp_path / "base")
    sharded(tmp_path / "tuned", seed=1)
    base, tuned = al.open_checkpoint(tmp_path / "base"), al.open_checkpoint(tmp_path / "tuned")
    change(tmp_path / "tuned" / "model-00002-of-00002.safetensors")

    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors: changed while it was read"):
        al.diff(base, tuned, progress=False)


def test_what_was_opened_is_what_is_read(tmp_path: Path) -> None:
    """A file that replaces an open one is not read in its place, not even in part."""
    folder = model(tmp_path / "model")
    checkpoint = al.open_checkpoint(folder)
    site = checkpoint.sites.where(role="gate_proj", layer=0)[0]
    model(tmp_path / "other", {name: 0 * value for name, value in values().items()})
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")

    assert np.array_equal(values()[GATE], checkpoint.read(site).numpy())
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.store.check()


def test_the_hash_of_the_content_is_that_of_one_content(tmp_path: Path) -> None:
    """A file that changes before its hash is computed is an error."""
    checkpoint = al.open_checkpoint(model(tmp_path / "model"))
    rewritten(tmp_path / "model" / "model.safetensors")

    with pytest.raises(CheckpointError, match="changed while it was read"):
        _ = checkpoint.identity


def test_a_pipe_that_takes_the_place_of_a_file_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that replaces a file before it is opened is refused: the open file is checked again."""
    file, look = tmp_path / "model.safetensors", Path.stat
    file.write_bytes(b"x")

    def swapped(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        state = look(self, follow_symlinks=follow_symlinks)
        file.unlink()
        os.mkfifo(file)
        return state

    monkeypatch.setattr(Path, "stat", swapped)
    found: list[Exception] = []

    def read() -> None:
        try:
            opened(file)
        except CheckpointError as error:
            found.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)

    assert ["this is not an ordinary file"] == [str(error).partition(": ")[2] for error in found]


def open_files() -> list[str]:
    """The names of the files that this process has open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            found.append(str(descriptor.readlink()))
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing tells what is open")
def test_a_file_stays_open_no_longer_than_it_is_wanted(tmp_path: Path) -> None:
    """A descriptor is closed with its object, also for a broken file."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 100)
    with file.open():
        assert str(file) in open_files()

    for _ in range(50):
        assert 100 == len(Span(LocalFile(file), 0, 100).read())
        with pytest.raises(CheckpointError):
            al.open_checkpoint(file)

    # Only this file is looked for: test workers that run side by side open and close others.
    assert str(file) not in open_files()
