"""A hub repository is read by ranges: few bytes, one commit, and every fault ends in a clear error.

The tests ask a hub of their own (`hub_server.py`).
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import save

from affectlens.checkpoints.hub import listing, remote
from affectlens.checkpoints.hub.listing import HubFile, cached, hub_files, open_hub, remote_file
from affectlens.checkpoints.hub.remote import RemoteFile
from affectlens.checkpoints.safetensors import INDEX
from affectlens.errors import CheckpointError
from tests.checkpoints.hub.hub_server import Hub, git_oid, posing

CONFIG = b'{"model_type": "llama"}'
TENSORS = {
    "big": torch.arange(400_000, dtype=torch.float32),
    "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "none": torch.zeros(0, 4),
}
WEIGHTS = save(TENSORS)
SHARDS = {"a.safetensors": save({"a": torch.ones(3)}), "b.safetensors": save({"b": torch.zeros(3)})}
SHARDED = {INDEX: json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}).encode(), **SHARDS}

# what goes wrong, where, how often, after how many bytes; each is got over
RECOVERED = (
    ("500", "cdn", 1, 0),
    ("429", "cdn", 2, 0),
    ("503", "resolve", 2, 0),
    ("reset", "cdn", 1, 0),
    ("reset", "cdn", 4, 100_000),
    ("stall", "cdn", 1, 70_000),
    ("403", "cdn", 1, 0),
    ("reset", "resolve", 1, 0),
)  # fmt: skip

# what goes wrong, where, for good or once → what is said
FATAL = (
    ("500", "cdn", 99, 0, "no data from the hub .HTTP 500.; gave up after"),
    ("429", "cdn", 1, 60, "HTTP 429, retry in 60 s"),
    ("503", "resolve", 99, 0, "HTTP 503"),
    ("stall", "cdn", 99, 10, "gave up after"),
    ("trickle", "cdn", 99, 10, "gave up after"),
    ("reset", "cdn", 99, 10, "gave up after"),
    ("403", "cdn", 99, 0, "127.0.0.1 refuses the hub's link .HTTP 403."),
    ("416", "cdn", 1, 0, "changed while it was read: it ends before byte"),
    ("size", "cdn", 1, 0, "changed while it was read: the hub lists 1,6.* bytes, the server has 1,6.*"),
    ("whole", "cdn", 1, 0, "can't send parts of a file. Download it first"),
    ("place", "cdn", 1, 0, "asked for byte .*, received byte .*"),
    ("etag", "cdn", 1, 0, "changed while it was read: its ETag changed"),
    ("hash", "resolve", 1, 0, "changed while it was read: the hub now lists another hash"),
    ("404", "resolve", 1, 0, "the hub has no such repository, revision or file"),
    ("crawl", "cdn", 99, 0, "gave up after"),
    ("crawl", "resolve", 99, 0, "gave up after"),
    ("more", "cdn", 1, 0, "changed while it was read: received more bytes than the hub lists"),
    ("gzip", "cdn", 1, 0, "the answer is compressed"),
    ("file", "resolve", 1, 0, "redirected to an address that is not http or https"),
    ("round", "resolve", 99, 0, "more than 5 redirects"),
)  # fmt: skip

# what goes wrong with a listing → what is said
UNLISTED = (
    ("stall", "gave up after"),
    ("trickle", "gave up after"),
    ("crawl", "gave up after"),
    ("reset", "gave up after"),
    ("500", "HTTP 500"),
    ("gzip", "the answer is compressed"),
    ("moved", "the hub requires a login|the hub refuses"),
)

# what a hub may say instead of a listing → what is said
NO_LISTINGS = (
    (b"<html>", "is not that of a hub"),
    (b"[]", "is not that of a hub"),
    (b"[" * 100_000, "is not that of a hub"),
    (b'{"sha": "../../etc"}', "answer has no commit"),
    (b'{"sha": 7, "siblings": []}', "answer has no commit"),
    (b'{"sha": "%s", "siblings": 7}' % (b"a" * 40), "no checkpoint here.*In it: nothing"),
)
COMMIT = "a" * 40
ODD_NAMES = ("../up.json", "/etc/passwd", "a/../../b.json", "", "nul\0.json", ".")

# files of a repository that is no checkpoint → what is said
NO_CHECKPOINTS = (
    ({"pytorch_model.bin": b"PK"}, "neither model.safetensors nor .* In it: config.json, pytorch_model.bin"),
    ({"x.safetensors": WEIGHTS, "y.safetensors": WEIGHTS}, "neither model.safetensors nor"),
    ({"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}, "this is a PEFT adapter"),
    ({INDEX: b"[]"}, "is not a JSON object"),
    ({INDEX: b"{"}, "is not valid JSON"),
    ({INDEX: b"{}"}, "no weight_map"),
    ({INDEX: b'{"weight_map": {"a": "../a.safetensors"}}'}, "outside the folder"),
    ({INDEX: b'{"weight_map": {"a": "c.safetensors"}}'}, "a shard that is missing: 'c.safetensors'"),
    ({**SHARDED, INDEX: b'{"weight_map": {"z": "a.safetensors"}}'}, "tensor 'z': no shard holds"),
    ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "Git LFS pointer"),
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Run a hub that huggingface_hub takes for the real one; a dead connection is noticed soon."""
    with posing(monkeypatch, cache=tmp_path / "cache") as server:
        server.push("lab/tiny", {"config.json": CONFIG, "model.safetensors": WEIGHTS, "README.md": b"#"})
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon; only for tests whose faults last, since a busy machine may be slow."""
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    monkeypatch.setattr(remote, "ATTEMPT", 0.2)


@pytest.fixture
def file(hub: Hub) -> RemoteFile:
    """Return the weights with their header read."""
    found = remote_file(hub_files("lab/tiny"), "model.safetensors")
    found.read_ahead()
    found.forget()
    return found


def read(file: RemoteFile, start: int, stop: int) -> bytes:
    """Return some bytes of a file, in new memory."""
    return bytes(file.fetch(start, stop, into=memoryview(bytearray(stop - start + 7))))


def test_tensors_are_those_of_the_file(hub: Hub) -> None:
    """Every tensor read from the hub equals the one that was pushed, and nothing is written to disk."""
    store = open_hub("lab/tiny")

    assert {"model_type": "llama"} == store.config
    assert {"big": "float32", "half": "bfloat16", "none": "float32"} == {
        name: header.dtype for name, header in store.headers.items()
    }
    for name, tensor in TENSORS.items():
        assert torch.equal(tensor, store.read(name))
    assert torch.equal(TENSORS["half"][1:], store.read("half", slice(1, 2)))
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_opening_reads_the_headers_alone(hub: Hub) -> None:
    """Opening a file makes one request, for 256 KiB."""
    store = open_hub("lab/tiny")

    assert [f"bytes=0-{256 * 1024 - 1}"] == [request.range for request in hub.asked("cdn")]
    assert 256 * 1024 == hub.sent["model.safetensors"]
    assert [256 * 1024] == [file.fetched for file in store.files]


def test_a_long_header_is_read_to_its_end(hub: Hub) -> None:
    """A header longer than the block read ahead costs one more request, for its rest."""
    header = json.dumps({"__metadata__": {"note": "x" * 300_000}}).encode()[:-1]
    header += b', "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}'
    hub.push("lab/long", {"model.safetensors": len(header).to_bytes(8, "little") + header + b"abcd"})

    store = open_hub("lab/long")

    assert f"bytes={256 * 1024}-{len(header) + 7}" == hub.asked("cdn")[1].range
    assert [97, 98, 99, 100] == store.read("a").tolist()


def test_only_the_bytes_that_are_needed_come(hub: Hub, file: RemoteFile) -> None:
    """Only the range of a part is requested, and the signed link is used again."""
    before = hub.sent["model.safetensors"]
    part = read(file, 700_001, 700_101)

    assert WEIGHTS[700_001:700_101] == part
    assert 100 == hub.sent["model.safetensors"] - before
    assert "bytes=700001-700100" == hub.asked("cdn")[-1].range
    assert 1 == len(hub.asked("resolve"))


def test_the_token_stays_with_the_hub(hub: Hub) -> None:
    """The token is sent to the hub, and not to the host it redirects to."""
    open_hub("lab/tiny").read("half")

    assert {True} == {request.authorized for request in hub.asked("api") + hub.asked("resolve")}
    assert {False} == {request.authorized for request in hub.asked("cdn")}


def test_a_name_holds_no_secret() -> None:
    """Errors call a file by its address, without password and query."""
    file = RemoteFile("https://me:secret@hub.org/lab/x/a.safetensors?token=secret", size=1)

    assert "https://hub.org/lab/x/a.safetensors" == file.name


def test_equal_files_have_equal_keys(hub: Hub) -> None:
    """A shard in two repositories is recognised by its hash before a byte of it is read."""
    changed = {**SHARDED, "b.safetensors": save({"b": torch.ones(3)})}
    hub.push("lab/base", SHARDED)
    hub.push("lab/tuned", changed)
    base, tuned = open_hub("lab/base"), open_hub("lab/tuned")

    assert base.span("a").key == tuned.span("a").key
    assert base.span("b").key != tuned.span("b").key
    assert ("sha256", hashlib.sha256(SHARDS["a.safetensors"]).hexdigest()) == base.files[0].key


def test_a_file_without_a_hash_is_known_by_its_etag(hub: Hub) -> None:
    """A file that git stores has git's hash as key, and may be served whole."""
    hub.fail("whole", at="resolve")
    file = remote_file(hub_files("lab/tiny"), "config.json")

    assert ("etag", hub.endpoint, git_oid(CONFIG)) == file.key
    assert CONFIG == read(file, 0, len(CONFIG))


def test_the_commit_is_asked_once(hub: Hub) -> None:
    """A later push changes nothing for an open repository."""
    before = hub_files("lab/tiny")
    hub.push("lab/tiny", {"model.safetensors": save({"other": torch.ones(2)})})
    store = open_hub("lab/tiny", listing=before)
    hub.signature += 1  # so that the hub has to be asked for the file again

    assert torch.equal(TENSORS["big"], store.read("big"))
    assert {before.commit} == {request.path.split("/")[4] for request in hub.asked("resolve")}
    assert f"lab/tiny@{before.commit}" == store.source
    assert ("lab/tiny", before.commit) == (store.name, store.facts["revision"])
    assert ["other"] == list(open_hub("lab/tiny").headers)
    assert ["big", "half", "none"] == sorted(open_hub(store.source).headers)


def test_branches_and_tags(hub: Hub) -> None:
    """`owner/name@revision` opens a branch."""
    hub.push("lab/tiny", {"only.safetensors": SHARDS["a.safetensors"]}, to="v2")

    assert ["a"] == list(open_hub("lab/tiny@v2").headers)


def test_shards_beside_a_single_file_do_not_count(hub: Hub) -> None:
    """If both exist, the single file is read, as in transformers."""
    hub.push("lab/both", {**SHARDED, "model.safetensors": WEIGHTS})

    assert ["big", "half", "none"] == sorted(open_hub("lab/both").headers)


@pytest.mark.parametrize(("kind", "at", "times", "after"), RECOVERED)
def test_faults_that_pass(hub: Hub, kind: str, at: str, times: int, after: int) -> None:
    """A connection that breaks, stalls or is refused for a while resumes at the byte it reached."""
    file = remote_file(hub_files("lab/tiny"), "model.safetensors")
    hub.fail(kind, at=at, times=times, after=after)

    assert WEIGHTS[1_000:1_500_000] == read(file, 1_000, 1_500_000)
    assert 1_499_000 == file.fetched


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("kind", "at", "times", "after", "message"), FATAL)
def test_faults_that_stay(
    hub: Hub, file: RemoteFile, kind: str, at: str, times: int, after: int, message: str
) -> None:
    """A lasting fault ends in time, in an error that names the file and no secret."""
    hub.fail(kind, at=at, times=times, after=after)
    if at == "resolve":
        hub.signature += 1
    began = time.monotonic()

    with pytest.raises(CheckpointError, match=message) as caught:
        read(file, 800_000, 1_200_000)
    assert 3 > time.monotonic() - began
    assert "/lab/tiny/resolve/" in str(caught.value)
    assert "Signature" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_a_link_that_expired_is_renewed(hub: Hub, file: RemoteFile) -> None:
    """If the CDN refuses a signed link, the hub is asked for another."""
    hub.signature += 1

    assert WEIGHTS[300_000:300_010] == read(file, 300_000, 300_010)
    assert 2 == len(hub.asked("resolve"))


def test_many_threads_read_one_file(hub: Hub, file: RemoteFile) -> None:
    """Parts that threads read at the same time are right, also when the link expires meanwhile."""
    starts = range(0, 1_600_000, 100_000)
    hub.signature += 1
    hub.fail("reset", times=3, after=50_000)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: read(file, start, min(start + 100_000, len(WEIGHTS))), starts))

    assert WEIGHTS[:1_600_000] == b"".join(parts)[:1_600_000]


def test_a_listing_gets_over_a_fault(hub: Hub) -> None:
    """A listing that fails once is asked for again."""
    hub.fail("503", at="api", times=2)

    assert {"config.json", "model.safetensors", "README.md"} == hub_files("lab/tiny").files.keys()


@pytest.mark.usefixtures("impatient")
def test_a_hub_that_is_gone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a connection, or a listing for long, the error says so."""
    hub.fail("503", at="api", times=99)
    with pytest.raises(CheckpointError, match=r"lab/tiny: no data from the hub .HTTP 503."):
        open_hub("lab/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"lab/tiny: no data from the hub .*[Rr]efused"):
        open_hub("lab/tiny")


def test_what_the_hub_does_not_give(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says whether repository, revision, file or access is missing."""
    hub.gated.add("lab/tiny")
    with pytest.raises(
        CheckpointError, match=r"lab/none: the repository does not exist, or is private.* HF_TOKEN"
    ):
        open_hub("lab/none")
    with pytest.raises(CheckpointError, match="lab/tiny@v9: the repository has no such revision"):
        open_hub("lab/tiny@v9")
    with pytest.raises(CheckpointError, match=r"has no file 'x.json'. In it: README.md, config.json"):
        remote_file(hub_files("lab/tiny"), "x.json")
    with pytest.raises(CheckpointError, match="is not a hub id"):
        open_hub("lab/--x..")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(CheckpointError, match=r"the repository is gated.*hf auth login"):
        open_hub("lab/tiny")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("kind", "message"), UNLISTED)
def test_listings_that_fail(hub: Hub, kind: str, message: str) -> None:
    """A listing that stalls, trickles, breaks or is compressed ends in time; the token stays with the hub."""
    hub.fail(kind, at="api", times=99, after=10)
    began = time.monotonic()

    with pytest.raises(CheckpointError, match=message):
        hub_files("lab/tiny")
    assert 3 > time.monotonic() - began
    assert not any(request.authorized for request in hub.asked("cdn"))


@pytest.mark.parametrize(("body", "message"), NO_LISTINGS)
def test_what_is_no_listing(hub: Hub, body: bytes, message: str) -> None:
    """An answer that is not a listing is an error, and no commit can name a folder elsewhere."""
    hub.listings["lab/tiny"] = body

    with pytest.raises(CheckpointError, match=message):
        open_hub("lab/tiny")


def test_a_listing_has_an_end(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing beyond the limit is not read to its end."""
    monkeypatch.setattr(listing, "JSON_LIMIT", 100_000)
    hub.listings["lab/tiny"] = b" " * 50_000_000

    with pytest.raises(CheckpointError, match="the hub's answer is larger than 100,000 bytes"):
        hub_files("lab/tiny")


def test_names_outside_the_repository_are_not_listed(hub: Hub) -> None:
    """A file outside the repository, or without a name or size, is not listed."""
    entries: list[object] = [{"rfilename": name, "size": 1, "blobId": COMMIT} for name in ODD_NAMES]
    entries += [{"rfilename": "a.json", "size": size} for size in (-1, "1", None)]
    entries += [7, {}, {"rfilename": 7, "size": 1}, {"rfilename": "good.json", "size": 1, "blobId": "../x"}]
    hub.listings["lab/tiny"] = json.dumps({"sha": COMMIT, "siblings": entries}).encode()

    assert {"good.json": HubFile(1, None, "")} == hub_files("lab/tiny").files


def test_an_index_of_too_many_shards(hub: Hub) -> None:
    """An index of a hundred thousand shards is refused before a request for one."""
    shards = [f"{n}.safetensors" for n in range(100_000)]
    index = json.dumps({"weight_map": {f"t{n}": shard for n, shard in enumerate(shards)}}).encode()
    hub.push("lab/many", {INDEX: index})
    entries: list[object] = [{"rfilename": shard, "size": 9, "blobId": COMMIT} for shard in shards]
    entries.append({"rfilename": INDEX, "size": len(index), "blobId": COMMIT})
    commit = hub.repositories["lab/many"]["main"].oid
    hub.listings["lab/many"] = json.dumps({"sha": commit, "siblings": entries}).encode()

    with pytest.raises(CheckpointError, match="names 100,000 shards"):
        open_hub("lab/many")
    assert [] == hub.asked("cdn")


def test_a_config_of_ten_gigabytes(hub: Hub) -> None:
    """A config that the hub lists as too large is not downloaded."""
    entries = [{"rfilename": "config.json", "size": 10**10, "blobId": COMMIT}]
    hub.listings["lab/tiny"] = json.dumps({"sha": COMMIT, "siblings": entries}).encode()

    with pytest.raises(CheckpointError, match=r"config.json: larger than 64,000,000 bytes"):
        open_hub("lab/tiny")
    assert [] == hub.asked("resolve")


def test_offline(hub: Hub, file: RemoteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE no request is made, and the error names it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)

    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        open_hub("lab/tiny")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        read(file, 0, 10)
    assert asked == len(hub.requests)


@pytest.mark.parametrize(("files", "message"), NO_CHECKPOINTS)
def test_no_checkpoint(hub: Hub, files: dict[str, bytes], message: str) -> None:
    """A repository without a checkpoint is an error that says what it holds."""
    hub.push("lab/odd", {"config.json": CONFIG, **files})

    with pytest.raises(CheckpointError, match=message):
        open_hub("lab/odd")


@pytest.mark.usefixtures("impatient")
def test_stalled_shards_are_told_at_once(hub: Hub) -> None:
    """Many shards that stall take no longer than one."""
    shards = {f"s{n}.safetensors": save({f"t{n}": torch.ones(2)}) for n in range(24)}
    index = {f"t{n}": f"s{n}.safetensors" for n in range(24)}
    hub.push("lab/many", {INDEX: json.dumps({"weight_map": index}).encode(), **shards})
    hub.fail("stall", times=999)
    began = time.monotonic()

    with pytest.raises(CheckpointError, match="gave up after"):
        open_hub("lab/many")
    assert 3 > time.monotonic() - began
    for thread in threading.enumerate():
        if "ThreadPoolExecutor" in thread.name:
            thread.join(2)


def test_whole_snapshots_are_found_in_the_cache(hub: Hub, fetched: Callable[..., Path]) -> None:
    """A snapshot in the hub's cache is used once all its shards are there, by branch and by commit."""
    commit = hub.push("lab/base", {**SHARDED, "config.json": CONFIG})
    fetched("config.json", INDEX, "a.safetensors")

    assert cached("lab/base") is None
    folder = fetched("b.safetensors").parent
    assert folder == cached("lab/base") == cached(f"lab/base@{commit}")
    assert cached("lab/base@v2") is None
    assert cached("lab/none") is None


def test_adapters_are_found_in_the_cache(hub: Hub, fetched: Callable[..., Path]) -> None:
    """A cached adapter is complete with its config and its weights."""
    hub.push("lab/base", {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS})
    folder = fetched("adapter_config.json").parent

    assert cached("lab/base") is None
    fetched("adapter_model.safetensors")
    assert folder == cached("lab/base")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Download files of lab/base into the hub's cache; returns the path of the last one."""
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_DISABLE_XET", True)

    def download(*names: str) -> Path:
        return [Path(hf_hub_download("lab/base", name)) for name in names][-1]

    return download
