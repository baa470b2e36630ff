"""A repository on a hub as a store: listed once, then read by ranges without a download.

    owner/name@revision ── hub_files ──▶ HubListing (one commit) ── open_hub ──▶ SafetensorsStore

The revision is resolved to a commit once, and every later request names that commit, so a push in between
can't mix two versions. `cached` finds a repository that is complete in the hub's own cache.
"""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.documents import JSON_LIMIT, Document, parse, read_json, weight_map
from affectlens.checkpoints.hub.answers import (
    BUSY,
    DOWNLOAD,
    Busy,
    Response,
    failures,
    offline,
    refusal,
    said,
)
from affectlens.checkpoints.hub.remote import HOPS, Patience, RemoteFile, asked, origin, redirected
from affectlens.checkpoints.safetensors import INDEX, SafetensorsStore
from affectlens.errors import CheckpointError, quoted

_SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_SHARDS = 5000  # no checkpoint has as many; each costs a request
_TORCH = re.compile(r"pytorch_model[^/]*\.bin(\.index\.json)?")
_AT_ONCE = 8  # shards whose headers are fetched together


class HubFile(NamedTuple):
    """A file as the hub lists it; `etag` is git's hash, `sha256` is there only for files outside git."""

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
        """The hub id that opens exactly this commit again, even after the branch moves on."""
        return f"{self.repository}@{self.commit}"


def hub_files(hub_id: str) -> HubListing:
    """List a repository's files at `owner/name` or `owner/name@revision`. Raises `CheckpointError`."""
    found = _asked(hub_id)
    commit, entries = found.get("sha"), found.get("siblings")
    if not isinstance(commit, str) or not _HASH.fullmatch(commit):
        raise CheckpointError(hub_id, "the hub's answer has no commit")
    files = map(_file, entries if isinstance(entries, list) else ())
    return HubListing(hub_id.partition("@")[0], commit, dict(filter(None, files)))


def listed(hub_id: str) -> HubListing | Path:
    """Return the listing of a repository, or its folder in the cache if the hub fails and that is complete.

    In the cache a branch is at the commit of its last download. Raises `CheckpointError`.
    """
    try:
        return hub_files(hub_id)
    except CheckpointError:
        here = cached(hub_id)
        if here is None:
            raise
        return here


def open_hub(hub_id: str, *, listing: HubListing | None = None) -> SafetensorsStore:
    """Open the safetensors files of a repository without a download; only their headers are read.

    Pass `listing` if `hub_files` was already called. The source of the store names the commit, so opening
    it again reads the same weights. Raises `CheckpointError`.
    """
    listing = listing or hub_files(hub_id)
    config = _json(listing, "config.json") if "config.json" in listing.files else Document({})
    weights = _weight_map(listing)
    names = sorted(set(weights.values())) or [_single(hub_id, listing)]
    if len(names) > _SHARDS:
        raise CheckpointError(
            f"{listing.source}/{INDEX}", f"names {len(names):,} shards (at most {_SHARDS:,})"
        )
    files = [remote_file(listing, name) for name in names]
    _read_ahead(files)
    store = SafetensorsStore(
        listing.source, files, config=config.content, revision=listing.commit, weights=weights
    )
    store.notes = (*store.notes, *config.notes("config.json"))
    store.name = hub_id  # as the user wrote it; facts have the commit
    for file in files:
        file.forget()
    for tensor in sorted(weights.keys() - store.headers.keys() - store.skipped.keys()):
        raise CheckpointError(f"{listing.source}/{INDEX}", "no shard holds this tensor", key=tensor)
    return store


def weight_files(listing: HubListing) -> list[str]:
    """Return the weight files that transformers would load; raises `CheckpointError`."""
    shards = sorted(set(_weight_map(listing).values()))
    torch = [name for name in listing.files if _TORCH.fullmatch(name)]
    if shards or not torch or any(name.endswith(".safetensors") for name in listing.files):
        return [INDEX, *shards] if shards else [_single(listing.source, listing)]
    return torch


def remote_file(listing: HubListing, filename: str) -> RemoteFile:
    """Return a file of the repository to read by ranges; raises `CheckpointError` if it is not listed."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    file = listing.files.get(filename)
    if file is None:
        raise CheckpointError(listing.source, f"has no file {filename!r}", fix=_there(listing))
    url = hf_hub_url(listing.repository, filename, revision=listing.commit)
    headers = build_hf_headers(library_name="affectlens")
    return RemoteFile(url, size=file.size, sha256=file.sha256, etag=file.etag, headers=headers)


def cached(hub_id: str) -> Path | None:
    """Find a repository in the hub's own cache if its config and weights are complete; makes no request.

    A branch is at the commit of its last download; `HubListing.source` names a commit.
    """
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = hub_id.partition("@")
    for config in ("config.json", _ADAPTER):
        found = try_to_load_from_cache(repository, config, revision=revision or None)
        if isinstance(found, str) and _whole(Path(found).parent):
            return Path(found).parent
    return None


def ask(name: str, url: str, *, headers: dict[str, str]) -> dict[str, Any]:
    """Return the JSON object at an address of a hub; errors call it `name`. Raises `CheckpointError`.

    A failing hub is asked again for a while. The headers, which hold the token, are sent only to its host.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    patience = Patience(name)
    while True:
        try:
            return _parsed(name, _body(name, url, headers=headers, patience=patience), url)
        except Busy as busy:
            patience.retry(str(busy), after=busy.after)
        except OfflineModeIsEnabled:
            raise offline(name) from None
        except failures() as error:
            patience.retry(said(error))


def _whole(snapshot: Path) -> bool:
    # The cache links a file only when its download is complete, so existing is enough.
    there = {path.name for path in snapshot.iterdir() if path.is_file()}
    if {_ADAPTER, "adapter_model.safetensors"} <= there:
        return True
    for single in (_SINGLE, "pytorch_model.bin"):
        if single in there:
            return True
        if (index := f"{single}.index.json") in there:
            weights = read_json(snapshot / index).content.get("weight_map")
            return isinstance(weights, dict) and all(str(name) in there for name in weights.values())
    return False


def _asked(hub_id: str) -> dict[str, Any]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import build_hf_headers, validate_repo_id

    repository, _, revision = hub_id.partition("@")
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise CheckpointError(hub_id, "is not a hub id", fix="Write owner/name@revision") from None
    url = f"{constants.ENDPOINT}/api/models/{repository}"
    url += f"/revision/{quote(revision, safe='')}" if revision else ""
    # `blobs` adds sizes and hashes to the listing.
    return ask(hub_id, f"{url}?blobs=true", headers=build_hf_headers(library_name="affectlens"))


def _file(entry: Any) -> tuple[str, HubFile] | None:
    """Parse an entry of a listing; None without valid name and size, or for a path out of the repository."""
    entry = entry if isinstance(entry, dict) else {}
    lfs = entry["lfs"] if isinstance(entry.get("lfs"), dict) else {}
    name, size, sha256 = entry.get("rfilename"), lfs.get("size", entry.get("size")), lfs.get("sha256")
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or {"..", "/"} & {*parts} or not name.isprintable() or type(size) is not int or size < 0:
        return None
    blob = entry.get("blobId")
    known = sha256 if isinstance(sha256, str) and _HASH.fullmatch(sha256) else None
    return name, HubFile(size, known, blob if isinstance(blob, str) and _HASH.fullmatch(blob) else "")


def _weight_map(listing: HubListing) -> dict[str, str]:
    """Return the file of each tensor from the index; empty if the weights are in a single file."""
    # If both exist, transformers loads the single file, so a diff must read that one too.
    if _SINGLE in listing.files or INDEX not in listing.files:
        return {}
    index = f"{listing.source}/{INDEX}"
    weights = weight_map(_json(listing, INDEX), index, suffixes=(".safetensors",))
    for name in sorted(set(weights.values())):
        if name not in listing.files:
            raise CheckpointError(index, f"names a shard that is missing: {quoted(name)}")
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
    fix = f"{_there(listing)}. For other formats run `hf download {listing.repository}` and open the folder"
    raise CheckpointError(hub_id, reason, fix=fix)


def _json(listing: HubListing, filename: str) -> Document:
    file = remote_file(listing, filename)
    if file.size > JSON_LIMIT:
        raise CheckpointError(file.name, f"larger than {JSON_LIMIT:,} bytes")
    return parse(bytes(Span(file, 0, file.size).read()), file.name)


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


def _body(name: str, url: str, *, headers: dict[str, str], patience: Patience) -> bytes:
    address = url
    for _ in range(HOPS):
        sent = {"accept-encoding": "identity", **(headers if origin(address) == origin(url) else {})}
        with asked(address, headers=sent, patience=patience) as response:
            if response.has_redirect_location:  # a repository that was renamed
                address = redirected(name, address, response=response)
                patience.drain(response)
                continue
            if response.status_code in BUSY:
                raise Busy(response)
            if response.status_code != 200:
                raise refusal(name, response)
            return _read(name, response, patience=patience)
    raise CheckpointError(name, f"more than {HOPS} redirects", fix=DOWNLOAD)


def _read(name: str, response: Response, *, patience: Patience) -> bytes:
    """Read an answer raw: decompressed, a short one could fill the memory."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise CheckpointError(name, "the answer is compressed", fix=DOWNLOAD)
    found = bytearray()
    for chunk in response.iter_raw():
        patience.heard(len(chunk))
        found += chunk
        if len(found) > JSON_LIMIT:
            raise CheckpointError(name, f"the hub's answer is larger than {JSON_LIMIT:,} bytes")
    return bytes(found)


def _parsed(name: str, body: bytes, url: str) -> dict[str, Any]:
    try:
        return parse(body, name).content
    except CheckpointError:
        raise CheckpointError(name, f"the answer of {origin(url)} is not that of a hub") from None
