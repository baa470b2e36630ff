"""Download files of a hub into the hub's own cache, where all its tools find them.

    HubListing ──▶ RemoteFile, a piece at a time ──▶ blobs/<hash> ◀── snapshots/<commit>/<name>

A file gets its name in the cache only when it is complete and its hash is the one that the hub lists.
`snapshot_download` of huggingface_hub is not used: it checks sizes but not hashes, and sets no limit to a
stalled download.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath

from affectlens.checkpoints.hub.listing import HubListing, listed, remote_file, weight_files
from affectlens.errors import CheckpointError, WriteError
from affectlens.files import whole
from affectlens.progress import shown

_PIECE = 2**24  # bytes per request
_AT_ONCE = 4  # files downloaded together


def download(listing: HubListing, names: Iterable[str], *, revision: str = "") -> Path:
    """Download the files of one commit that the cache lacks; returns the folder that holds them.

    `revision` is the branch or tag of the commit, by which the cache finds it again. Raises
    `CheckpointError` or `WriteError`; no partial file is left then.
    """
    cache = _cache(listing.repository)
    folder = cache / "snapshots" / listing.commit
    lacking = [name for name in names if not (folder / name).exists()]
    size = sum(listing.files[name].size for name in lacking)
    try:
        with shown(size, unit="B", what=f"download {listing.repository}") as step:
            for name, blob in _blobs(listing, lacking, into=cache / "blobs", told=step):
                _link(folder / name, blob)
        _remember(cache / "refs", revision or "main", commit=listing.commit)
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(f"{cache}: can't be written to ({error.strerror})") from None
    return folder


def fetched(hub_id: str, wanted: re.Pattern[str]) -> Path:
    """Download the weights of a repository and all files whose paths match `wanted`; returns their folder.

    If the hub can't be reached, this is the folder in the cache. Raises `CheckpointError`.
    """
    listing = listed(hub_id)
    if isinstance(listing, Path):
        return listing
    weights = weight_files(listing)
    beside = [name for name in listing.files if wanted.fullmatch(name) and name not in weights]
    return download(listing, [*weights, *beside], revision=hub_id.partition("@")[2])


def _cache(repository: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder: str = repo_folder_name(repo_id=repository, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder


def _blobs(
    listing: HubListing, names: list[str], *, into: Path, told: Callable[[int], object]
) -> Iterator[tuple[str, Path]]:
    """Download several files at a time; the first that fails stops the others at their next piece."""
    pool, failures = ThreadPoolExecutor(_AT_ONCE), list[BaseException]()

    def arrived(count: int) -> None:
        told(count)
        # Every thread stops at the first failure of any.
        for failure in failures[:1]:
            raise failure

    def fetch(name: str) -> Path:
        try:
            arrived(0)
            return _blob(listing, name, into=into, told=arrived)
        except BaseException as error:
            failures.append(error)  # before this thread starts another file
            raise

    try:
        jobs = {pool.submit(fetch, name): name for name in names}
        for job in as_completed(jobs):
            arrived(0)
            yield jobs[job], job.result()
    except BaseException as error:
        failures.append(error)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _blob(listing: HubListing, name: str, *, into: Path, told: Callable[[int], object]) -> Path:
    """Download a file and name it by its hash: SHA-256, or git's own for a file that git stores itself."""
    known, file = listing.files[name], remote_file(listing, name)
    blob = into / (known.sha256 or known.etag)
    # Without a hash in the listing the name is empty, and the path that of the folder.
    if blob == into:
        raise CheckpointError(file.name, "the hub lists no hash to check this file against")
    if blob.exists():
        told(file.size)
        return blob
    # git hashes the kind and size of a file before its content.
    digest = hashlib.sha256() if known.sha256 else hashlib.sha1(b"blob %d\0" % file.size)
    buffer = memoryview(bytearray(min(_PIECE, file.size)))
    with whole(blob) as partial:
        with open(partial, "wb") as stream:
            for start in range(0, file.size, _PIECE):
                piece = file.fetch(start, min(start + _PIECE, file.size), into=buffer)
                digest.update(piece)
                stream.write(piece)
                told(len(piece))
        if digest.hexdigest() != blob.name:
            reason = "the hash of the downloaded file is not the one that the hub lists"
            raise CheckpointError(file.name, reason, fix="Run it again")
    return blob


def _link(place: Path, blob: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # Another process may make the same link, so a new one replaces it in one step.
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as folder:
        link = Path(folder) / "link"
        link.symlink_to(os.path.relpath(blob, place.parent))
        os.replace(link, place)


def _remember(refs: Path, revision: str, *, commit: str) -> None:
    """Record the commit of a branch or tag; names that lead out of `refs` are not recorded."""
    if revision != commit and not {"..", "/"} & {*PurePosixPath(revision).parts}:
        with whole(refs / revision) as partial:
            partial.write_text(commit, "utf-8")
