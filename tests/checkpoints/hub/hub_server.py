"""A hub for tests: the file protocol of huggingface.co on two ports, with faults to order.

One port lists repositories (`/api/models/…`) and resolves files; large ones (`.safetensors`) it sends on
with a 302 to the other port, the CDN, whose links are signed and can expire. Every request is logged.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

from affectlens.checkpoints.hub import remote


class Request(NamedTuple):
    """A request: to the hub's `api` or `resolve`, or to the `cdn`."""

    at: str
    path: str
    range: str
    authorized: bool


class Commit(NamedTuple):
    """The files of a repository at one commit."""

    oid: str
    files: dict[str, bytes]


@dataclass
class Fault:
    """A fault at one place: its kind, how often it happens, and after how many bytes."""

    kind: str
    at: str = "cdn"
    times: int = 1
    after: int = 0

    @property
    def answered(self) -> bool:
        """Return whether the request is answered already."""
        return self.kind.isdecimal() or self.kind == "crawl"


@dataclass
class Hub:
    """The repositories of the hub, the faults that are ordered, and the requests so far."""

    repositories: dict[str, dict[str, Commit]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)  # bytes of the bodies, by file
    listings: dict[str, bytes] = field(default_factory=dict)  # said instead of what is there
    signature: int = 0  # links signed with another one have expired
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""
    cdn: str = ""

    def push(self, name: str, files: dict[str, bytes], *, to: str = "main") -> str:
        """Add a commit to a branch and return its hash."""
        digest = hashlib.sha1(name.encode())
        for file, content in sorted(files.items()):
            digest.update(file.encode() + content)
        commit = Commit(digest.hexdigest(), files)
        self.repositories.setdefault(name, {}).update({to: commit, commit.oid: commit})
        return commit.oid

    def fail(self, kind: str, *, at: str = "cdn", times: int = 1, after: int = 0) -> None:
        """Order a fault."""
        self.faults.append(Fault(kind, at, times, after))

    def fault(self, at: str) -> Fault:
        """Take the next fault at a place."""
        with self.lock:
            for due in self.faults:
                if due.at == at and due.times:
                    due.times -= 1
                    return due
        return Fault("")

    def asked(self, at: str) -> list[Request]:
        """Return the requests at one place."""
        return [request for request in self.requests if request.at == at]


class Server(ThreadingHTTPServer):
    """A server that ignores clients who hang up."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Do nothing."""


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub and its CDN until the block ends."""
    hub = Hub()
    servers = [Server(("127.0.0.1", 0), handler(hub, kind)) for kind in (HubAnswer, CdnAnswer)]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


@contextmanager
def posing(monkeypatch: pytest.MonkeyPatch, *, cache: Path) -> Iterator[Hub]:
    """Run a hub in place of the real one for huggingface_hub; a dead connection is noticed soon.

    huggingface_hub reads HF_HUB_OFFLINE, which `tests/conftest.py` sets, and the endpoint into constants when
    it is imported; so the constants are set. The session is closed before and after, so that no connection to
    the hub of one test serves another.
    """
    with serving() as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(remote, "BACKOFF", 0.01)
        monkeypatch.setattr(remote, "ATTEMPT", 0.3)
        close_session()
        yield hub
        close_session()


def handler(hub: Hub, kind: "type[Answer]") -> "type[Answer]":
    """Return the class that a server makes for each connection."""
    return type(kind.__name__, (kind,), {"hub": hub})


def git_oid(content: bytes) -> str:
    """Return git's hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Answer(BaseHTTPRequestHandler):
    """Logging, ranges and faults, which the hub and the CDN share."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 5  # seconds; an idle connection would keep the server from closing

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Do nothing."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self.do_GET()

    def note(self, at: str) -> Fault:
        """Log the request and take its fault; one that is a plain status is answered here."""
        asked = Request(at, self.path, self.headers.get("range", ""), "authorization" in self.headers)
        with self.hub.lock:
            self.hub.requests.append(asked)
        fault = self.hub.fault(at)
        if fault.kind == "crawl":
            self.crawl()
        if fault.kind.isdecimal():
            self.reply(int(fault.kind), {"retry-after": str(fault.after)} if fault.after else {})
        return fault

    def crawl(self) -> None:
        """Send endless headers, a byte at a time."""
        for byte in b"HTTP/1.1 200 OK\r\nx-more: " + b"x" * 10_000:
            if self.hub.closing.wait(0.02) or self.close_connection:
                break
            self.write("headers", bytes([byte]))
        self.close_connection = True

    def reply(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        """Send a whole answer."""
        self.send_response(status)
        for key, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def give(self, name: str, content: bytes, headers: dict[str, str], *, fault: Fault) -> None:
        """Send the requested part of a file, or what the fault makes of it."""
        start, stop = self.part(len(content))
        if fault.kind == "whole":
            start, stop = 0, len(content)
        if fault.kind == "etag":
            headers = {**headers, "etag": '"another"'}
        if fault.kind == "gzip":
            headers = {**headers, "content-encoding": "gzip"}
        partial = (start, stop) != (0, len(content)) or ("range" in self.headers and fault.kind != "whole")
        self.send_response(206 if partial else 200)
        more = b"more" if fault.kind == "more" else b""
        for key, value in {**headers, "content-length": str(stop - start + len(more))}.items():
            self.send_header(key, value)
        if partial:
            size = len(content) + (8 if fault.kind == "size" else 0)
            first = start + (1 if fault.kind == "place" else 0)
            self.send_header("content-range", f"bytes {first}-{stop - 1}/{size}")
        self.end_headers()
        if self.command != "HEAD":
            turned = content[::-1] if fault.kind == "turned" else content
            self.send_body(name, turned[start:stop] + more, fault)

    def part(self, size: int) -> tuple[int, int]:
        """Return the requested range; the whole file without one."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)

    def send_body(self, name: str, body: bytes, fault: Fault) -> None:
        """Write the body; after some bytes the connection may break, stall or trickle."""
        broken = fault.kind in ("reset", "stall", "trickle")
        now = body[: fault.after] if broken else body
        self.write(name, now)
        if fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if fault.kind == "stall":
            self.hub.closing.wait(5)
        rest = body[len(now) :] if fault.kind == "trickle" else b""
        for place in range(len(rest)):
            if self.hub.closing.wait(0.05):
                return
            self.write(name, rest[place : place + 1])
        self.close_connection = broken

    def write(self, name: str, body: bytes) -> None:
        """Write bytes and count them."""
        with self.hub.lock:
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(body)
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:  # the reader is gone
            self.close_connection = True


class HubAnswer(Answer):
    """Lists repositories and resolves files; sends small files itself."""

    def do_GET(self) -> None:
        """Answer `/api/models/{id}`, `/api/models/{id}/revision/{rev}` or `/{id}/resolve/{rev}/{file}`."""
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # huggingface_hub asks this for its user-agent
            return self.reply(404)
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        resolved = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = listed or resolved
        fault = self.note("api" if listed else "resolve")
        if fault.answered:
            return None
        commits = self.hub.repositories.get(found[1] if found else "")
        commit = (commits or {}).get((found[2] if found else "") or "main")
        if found is None or commits is None:
            return self.reply(401, {"x-error-code": "RepoNotFound"})
        if commit is None:
            return self.reply(404, {"x-error-code": "RevisionNotFound"})
        if listed:
            return self.list(found[1], commit, fault)
        if found[1] in self.hub.gated and "authorization" not in self.headers:
            return self.reply(403, {"x-error-code": "GatedRepo"})
        return self.resolve(commit, found[3], fault)

    def list(self, name: str, commit: Commit, fault: Fault) -> None:
        """Send the commit and its files, as `model_info(files_metadata=True)` reads them."""
        files = []
        for file, content in commit.files.items():
            entry: dict[str, object] = {"rfilename": file, "blobId": git_oid(content), "size": len(content)}
            if file.endswith(".safetensors"):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            files.append(entry)
        body = {"_id": "0", "id": name, "modelId": name, "sha": commit.oid, "siblings": files, "tags": []}
        content = self.hub.listings.get(name) or json.dumps(body).encode()
        if fault.kind == "moved":
            return self.reply(307, {"location": f"{self.hub.cdn}/api/models/{name}"})
        return self.give(name, content, {"content-type": "application/json"}, fault=fault)

    def resolve(self, commit: Commit, file: str, fault: Fault) -> None:
        """Send a small file, or redirect to the CDN for a large one."""
        if file not in commit.files:
            return self.reply(404, {"x-error-code": "EntryNotFound"})
        content = commit.files[file]
        if not file.endswith(".safetensors"):
            headers = {"x-repo-commit": commit.oid, "etag": f'"{git_oid(content)}"'}
            return self.give(file, content, headers, fault=fault)
        sha256 = "0" * 64 if fault.kind == "hash" else hashlib.sha256(content).hexdigest()
        places = {"file": "file:///etc/passwd", "round": self.path}
        place = f"{self.hub.cdn}/{commit.oid}/{file}?Signature={self.hub.signature}"
        headers = {
            "location": places.get(fault.kind, place),
            "x-repo-commit": commit.oid,
            "x-linked-etag": f'"{sha256}"',
            "x-linked-size": str(len(content)),
        }
        return self.reply(302, headers, b"Found. Redirecting")


class CdnAnswer(Answer):
    """Sends parts of files to clients with a valid link."""

    def do_GET(self) -> None:
        """Answer `/{commit}/{file}?Signature=…`."""
        fault = self.note("cdn")
        if fault.answered:
            return None
        parts = urlsplit(self.path)
        if parse_qs(parts.query).get("Signature") != [str(self.hub.signature)]:
            return self.reply(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
        oid, _, file = unquote(parts.path)[1:].partition("/")
        found = (commits[oid] for commits in self.hub.repositories.values() if oid in commits)
        content = next(found).files[file]
        headers = {"etag": f'"{hashlib.md5(content).hexdigest()}"'}
        return self.give(file, content, headers, fault=fault)
