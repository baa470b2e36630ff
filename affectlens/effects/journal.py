"""The journal of a sweep: each result is on disk as soon as it is found, so a killed run resumes.

One SQLite file in WAL mode, one row per model and task. The key is a hash of the weights, of the changes made
to them and of the input, so a stale result is never used: another donor, task or version of torch has other
keys, and several sweeps may share one file.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from affectlens.errors import JournalError

_MARK = 0x41464C31  # "AFL1" in SQLite's application_id, which says whose file it is
_TABLE = (
    "CREATE TABLE IF NOT EXISTS judged (key TEXT PRIMARY KEY, at TEXT NOT NULL, "
    "rows INTEGER NOT NULL, columns INTEGER NOT NULL, logps BLOB NOT NULL) STRICT"
)
_BESIDE = ("-wal", "-shm", "-journal")
_SAMPLE = 1024  # values of each tensor that are hashed one by one, beside the sum of all


def discard(path: str | Path) -> None:
    """Delete a journal and the files that SQLite keeps beside it."""
    for name in ("", *_BESIDE):
        Path(f"{path}{name}").unlink(missing_ok=True)


class Journal:
    """Log-probabilities by key in one file, each written whole or not at all. Close it after use.

    Raises `JournalError` for a file that is not a journal, is broken or can't be written.
    """

    def __init__(self, path: str | Path) -> None:
        given = Path(path)
        self.path = given / "sweep.journal" if given.is_dir() else given
        with self._reporting():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():
                raise JournalError(f"{self.path}: this is not an ordinary file")
            self._rows = sqlite3.connect(self.path, isolation_level=None, timeout=60)
            try:
                self._rows.execute("PRAGMA trusted_schema = OFF")
                self._rows.execute("PRAGMA journal_mode = WAL")
                self._rows.execute("PRAGMA synchronous = FULL")
                self._claim()
            except BaseException:
                self._rows.close()
                raise

    def _claim(self) -> None:
        (mark,) = self._rows.execute("PRAGMA application_id").fetchone()
        (tables,) = self._rows.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if mark != _MARK and tables:
            raise JournalError(f"{self.path}: this is another program's database. Give another path")
        self._rows.execute(f"PRAGMA application_id = {_MARK}")
        self._rows.execute(_TABLE)

    def found(self, key: str) -> Float[np.ndarray, "examples labels"] | None:
        """Return the log-probabilities of a key, in float32, or None."""
        with self._reporting():
            row = self._rows.execute(
                "SELECT rows, columns, logps FROM judged WHERE key = ?", (key,)
            ).fetchone()
        if row is None:
            return None
        rows, columns, raw = row
        if rows < 0 or columns < 0 or len(raw) != 4 * rows * columns:
            raise JournalError(
                f"{self.path}: the journal is broken, with {len(raw)} bytes for {rows} × {columns} numbers. "
                "Delete it"
            )
        # A copy, since torch warns of arrays that can't be written.
        return np.frombuffer(raw, "<f4").reshape(rows, columns).copy()

    def keep(self, found: Mapping[str, Float[np.ndarray, "examples labels"]]) -> None:
        """Write results by key, all of them or none; keys that are there already stay as they are."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        entries = [
            (key, at, *logps.shape, np.ascontiguousarray(logps, "<f4").tobytes())
            for key, logps in found.items()
        ]
        with self._reporting():
            # IMMEDIATE takes the write lock now: sweeps that share the file wait for each other.
            self._rows.execute("BEGIN IMMEDIATE")
            try:
                self._rows.executemany("INSERT OR IGNORE INTO judged VALUES (?, ?, ?, ?, ?)", entries)
                self._rows.execute("COMMIT")
            except BaseException:
                if self._rows.in_transaction:
                    self._rows.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file."""
        self._rows.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            fix = "Its earlier results are unchanged"
            raise JournalError(f"{self.path}: can't be used as a journal ({error}). {fix}") from None


def fingerprint(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of named tensors: names, dtypes, shapes, the sum of all bytes and a sample of the values.

    The sum sees a change of any one byte; the sample sees values that change places. A hash of every byte of
    a large model would hold up each sweep.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        flat = tensor.detach().reshape(-1)
        about = [name, str(tensor.dtype), list(tensor.shape), _byte_sum(flat)]
        digest.update(json.dumps(about).encode())
        some = flat[:: max(1, len(flat) // _SAMPLE)].contiguous().cpu()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def combined(*parts: object) -> str:
    """Return one hash of several, or of any values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _byte_sum(flat: Tensor) -> int:
    raw = flat.contiguous().view(torch.uint8)
    whole = len(raw) // 8 * 8
    words = raw[:whole].clone() if raw.data_ptr() % 8 else raw[:whole]
    # Integers wrap round, so the sum is the same in any order, on any device.
    return int(words.view(torch.int64).sum()) + int(raw[whole:].sum())
