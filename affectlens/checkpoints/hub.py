"""A repository on a hub as a store: listed once, read by ranges, never downloaded.

    owner/name@revision ── hub_files ──▶ HubListing (one commit) ── open_hub ──▶ SafetensorsStore

The revision is turned into a commit once, and all that follows is asked of that commit: a push meanwhile
can't mix two versions. What the hub's own cache holds whole is for `cached` to find.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.remote import BUSY, Patience, RemoteFile, failures, offline, refusal, said
from affectlens.checkpoints.safetensors import INDEX, JSON_LIMIT, SafetensorsStore, read_json
from affectlens.errors import CheckpointError

_SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
_AT_ONCE = 8  # shards whose headers are fetched together


class HubFile(NamedTuple):
    """What the hub tells of a file; the hash of its content only where git doesn't hold it itself."""

    size: int
    sha256: str | None
    etag: str


class HubListing(NamedTuple):
    """The files of a repository at one commit."""

    repository: str
    commit: str
    files: Mapping[str, HubFile]

    @property
    def source(self) -> str:
        """What opens just this commit again, wherever the branch is by then."""
        return f"{self.repository}@{self.commit}"


def hub_files(hub_id: str) -> HubListing:
    """List a repository's files at `owner/name` or `owner/name@revision`. Raises `CheckpointError`."""
    repository, _, revision = hub_id.partition("@")
    info = _asked(hub_id, repository, revision or None)
    files = {}
    for file in info.siblings or ():
        lfs = file.lfs
        size = file.size if lfs is None else lfs.size
        if size is not None:
            files[file.rfilename] = HubFile(size, None if lfs is None else lfs.sha256, file.blob_id or "")
    if not info.sha:
        raise CheckpointError(hub_id, "the hub does not tell the commit")
    return HubListing(repository, info.sha, files)


def open_hub(hub_id: str, *, listing: HubListing | None = None) -> SafetensorsStore:
    """Open a repository's safetensors files where they lie; their headers alone are read.

    `listing` is that of `hub_files` where it is at hand. The store's source names the commit, so whoever
    opens it again reads the same. Raises `CheckpointError`.
    """
    listing = listing or hub_files(hub_id)
    config = _json(listing, "config.json") if "config.json" in listing.files else {}
    weights = _weight_map(listing)
    names = sorted(set(weights.values())) or [_single(hub_id, listing)]
    files = [remote_file(listing, name) for name in names]
    _read_ahead(files)
    store = SafetensorsStore(listing.source, files, config=config, revision=listing.commit)
    store.name = hub_id  # the commit stands beside it, as the revision
    for file in files:
        file.forget()
    for tensor in sorted(weights.keys() - store.headers.keys()):
        raise CheckpointError(f"{listing.source}/{INDEX}", "no shard holds this tensor", key=tensor)
    return store


def remote_file(listing: HubListing, filename: str) -> RemoteFile:
    """A file of the repository, to be read by ranges."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    file = listing.files.get(filename)
    if file is None:
        raise CheckpointError(listing.source, f"has no file {filename!r}", fix=_there(listing))
    url = hf_hub_url(listing.repository, filename, revision=listing.commit)
    headers = build_hf_headers(library_name="affectlens")
    return RemoteFile(url, size=file.size, sha256=file.sha256, etag=file.etag, headers=headers)


def cached(hub_id: str) -> Path | None:
    """Find a repository in the hub's own cache, if all that is needed of it is there; asks no one.

    A branch is what it was when it was last downloaded; `HubListing.source` names a commit.
    """
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = hub_id.partition("@")
    for config in ("config.json", _ADAPTER):
        found = try_to_load_from_cache(repository, config, revision=revision or None)
        if isinstance(found, str) and _whole(Path(found).parent):
            return Path(found).parent
    return None


def _whole(snapshot: Path) -> bool:
    # The cache links a file only when it has come as a whole, so to be there is enough.
    there = {path.name for path in snapshot.iterdir() if path.is_file()}
    if _SINGLE in there or INDEX not in there:
        return _SINGLE in there or {_ADAPTER, "adapter_model.safetensors"} <= there
    weights = read_json(snapshot / INDEX).get("weight_map")
    return isinstance(weights, dict) and all(str(name) in there for name in weights.values())


def _asked(hub_id: str, repository: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api, patience = HfApi(library_name="affectlens"), Patience(hub_id)
    while True:
        timeout = patience.timeout
        try:
            return api.model_info(repository, revision=revision, files_metadata=True, timeout=timeout)
        except OfflineModeIsEnabled:
            raise offline(hub_id) from None
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY:
                raise refusal(hub_id, error.response) from None
            patience.retry(f"HTTP {error.response.status_code}")
        except failures() as error:
            patience.retry(said(error))
        except HFValidationError:
            raise CheckpointError(hub_id, "is no hub id", fix="Write owner/name@revision") from None
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(hub_id, f"{api.endpoint} answers, but not as a hub does") from None


def _weight_map(listing: HubListing) -> dict[str, str]:
    """The file of each tensor, as the index has it; empty where no index counts."""
    # Where both are there, transformers loads the single file; so the diff reads what the lens runs.
    if _SINGLE in listing.files or INDEX not in listing.files:
        return {}
    index = f"{listing.source}/{INDEX}"
    weights = _json(listing, INDEX).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        raise CheckpointError(index, "the index has no weight_map from tensors to files")
    # An index comes from strangers: it may name any path, or none.
    for name in sorted(set(weights.values())):
        if Path(name).name != name:
            raise CheckpointError(index, f"names a file outside the folder: {name!r}")
        if name not in listing.files:
            raise CheckpointError(index, f"names a shard that is missing: {name!r}")
    return weights


def _single(hub_id: str, listing: HubListing) -> str:
    if _SINGLE in listing.files:
        return _SINGLE
    if _ADAPTER in listing.files:
        fix = "Merge the adapter into its base first (PEFT's merge_and_unload)"
        raise CheckpointError(hub_id, "this is a PEFT adapter, not a whole checkpoint", fix=fix)
    others = [name for name in listing.files if name.endswith(".safetensors") and "/" not in name]
    if len(others) == 1:
        return others[0]
    reason = f"no checkpoint here: neither {_SINGLE} nor {INDEX}"
    fix = f"{_there(listing)}. Other formats are for `hf download {listing.repository}`, then open the folder"
    raise CheckpointError(hub_id, reason, fix=fix)


def _json(listing: HubListing, filename: str) -> dict[str, Any]:
    file = remote_file(listing, filename)
    if file.size > JSON_LIMIT:
        raise CheckpointError(file.name, f"larger than {JSON_LIMIT:,} bytes")
    try:
        found = json.loads(Span(file, 0, file.size).read())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise CheckpointError(file.name, "is not valid JSON") from None
    if not isinstance(found, dict):
        raise CheckpointError(file.name, "is not a JSON object")
    return found


def _read_ahead(files: list[RemoteFile]) -> None:
    # One after the other, the hundred shards of a large model would take a minute to open.
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        for _ in pool.map(RemoteFile.read_ahead, files):
            pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # the first error is told at once


def _there(listing: HubListing) -> str:
    return f"In it: {', '.join(sorted(listing.files)[:6]) or 'nothing'}"
