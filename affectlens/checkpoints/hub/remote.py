"""A file on a hub, read by ranges like a local one, without a download.

    hub address ── 302 ──▶ signed address at a CDN ── 206 ──▶ the caller's buffer

When the signed address expires, the hub is asked for a new one. The token is sent only to the hub. A broken
connection resumes at the byte it reached; one that makes no progress ends in an error.
"""

import re
import sys
import threading
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urljoin, urlsplit

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
from affectlens.errors import CheckpointError

PATIENCE = 25.0  # seconds without progress before giving up
ATTEMPT = 10.0  # seconds without a byte before a connection counts as dead
BACKOFF = 0.5  # seconds before the second try; doubled for each later one
FIRST = 256 * 1024  # bytes read ahead; most headers are shorter
HOPS = 5  # redirects followed
_PROGRESS = 64 * 1024  # bytes that count as progress; fewer, and a trickle would never end in an error
_UNTOLD = sys.maxsize  # a size that the server does not state
_GONE = (401, 403, 404, 410)  # a CDN's answers to an expired address


class Patience:
    """The time that a hub may fail and stall: the waits between tries grow, then follows an error."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin()

    @property
    def left(self) -> float:
        """Seconds left before giving up."""
        return max(0.01, self._until - time.monotonic())

    @property
    def timeout(self) -> float:
        """Seconds that the next read may take, for the timeout of the connection."""
        return min(ATTEMPT, self.left)

    def heard(self, count: int) -> None:
        """Count received bytes; enough restart the clock. Raises `CheckpointError` when time is up."""
        self._bytes += count
        if self._bytes >= _PROGRESS:
            self._begin()
        elif time.monotonic() > self._until:
            raise self._given_up(f"only {self._bytes:,} bytes")

    def drain(self, response: Response) -> None:
        """Read the rest of a short answer, so that its connection can be reused."""
        if number(response.headers.get("content-length")) < _PROGRESS:
            for chunk in response.iter_raw():  # raw: decompressed it could be of any size
                self.heard(len(chunk))

    def retry(self, why: str, *, after: float = 0.0) -> None:
        """Wait before the next try, or raise `CheckpointError` if no time is left for one."""
        self._wait *= 2
        wait = max(self._wait, after)
        if time.monotonic() + wait > self._until:
            raise self._given_up(why)
        time.sleep(wait)

    def _begin(self) -> None:
        self._until, self._wait, self._bytes = time.monotonic() + PATIENCE, BACKOFF / 2, 0

    def _given_up(self, why: str) -> CheckpointError:
        passed = PATIENCE - (self._until - time.monotonic())
        reason = f"no data from the hub ({why}); gave up after {passed:.0f} s"
        return CheckpointError(self._name, reason, fix=f"Check the network and run it again. {DOWNLOAD}")


class RemoteFile:
    """A file at an address that serves ranges of bytes.

    `size` and `sha256` are those in the hub's listing (`etag` if it has no hash); `headers` hold the token.
    No request is made before the first fetch.
    """

    remote = True

    def __init__(
        self,
        url: str,
        *,
        size: int,
        sha256: str | None = None,
        etag: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.size, self.name = (
            size,
            origin(url) + urlsplit(url).path,
        )  # shown to people: no password, no query
        self.fetched = 0  # bytes received
        self._url, self._sha256, self._etag, self._headers = url, sha256, etag, dict(headers or {})
        self._address = url
        self._etags: dict[str, str] = {}  # by host
        self._first = b""
        self._lock = threading.Lock()

    @property
    def key(self) -> Hashable:
        """The hash of the content if the hub lists it: equal in all repositories that have the file."""
        if self._sha256:
            return "sha256", self._sha256
        return "etag", origin(self._url), self._etag or self._url

    def fetch(self, start: int, stop: int, *, into: memoryview) -> memoryview:
        """Read into the buffer `into`, from the hub; raises `CheckpointError`."""
        wanted = into[: stop - start]
        ahead = self._first[start:stop]
        wanted[: len(ahead)] = ahead
        if len(ahead) < len(wanted):
            self._receive(start + len(ahead), wanted[len(ahead) :])
        return wanted

    def check(self) -> None:
        """Do nothing: every answer was already compared with the one before it."""

    def read_ahead(self) -> None:
        """Fetch the first block, so that reading a header costs one request instead of two."""
        block = bytearray(min(FIRST, self.size))
        self._receive(0, memoryview(block))
        self._first = bytes(block)

    def forget(self) -> None:
        """Drop the block that was read ahead: those of hundreds of shards would add up."""
        self._first = b""

    def _receive(self, start: int, into: memoryview) -> None:
        from huggingface_hub.errors import OfflineModeIsEnabled

        patience, whole = Patience(self.name), len(into) == self.size
        done, reached, renewed = 0, 0, False
        while done < len(into):
            why, after = "the answer was cut short", 0.0
            try:
                # After a refusal ask the hub, even if another thread restores the expired address.
                address = self._url if renewed else self._address
                part = (start + done, start + len(into))
                with self._answer(address, part, whole=whole, patience=patience) as answer:
                    done = done if answer.status_code == 206 else 0  # a 200 starts again at byte 0
                    for chunk in answer.iter_raw():
                        done = self._put(chunk, into, done)
                        patience.heard(max(0, done - reached))
                        reached = max(done, reached)
            except _Expired as expired:
                if renewed:
                    raise CheckpointError(self.name, str(expired), fix=DOWNLOAD) from None
                renewed = True
                continue
            except Busy as busy:
                why, after = str(busy), busy.after
            except OfflineModeIsEnabled:
                raise offline(self.name) from None
            except failures() as error:
                why = said(error)
            renewed = False
            if done < len(into):
                patience.retry(why, after=after)

    def _put(self, chunk: bytes, into: memoryview, done: int) -> int:
        with self._lock:
            self.fetched += len(chunk)
        end = done + len(chunk)
        if end > len(into):
            raise self._changed("received more bytes than the hub lists")
        into[done:end] = chunk
        return end

    @contextmanager
    def _answer(
        self, address: str, part: tuple[int, int], *, whole: bool, patience: Patience
    ) -> Iterator[Response]:
        """Yield the answer whose body is a part of the file, after redirects."""
        start, stop = part
        for _ in range(HOPS):
            # In a compressed body the offsets of the header would be wrong.
            headers = {"accept-encoding": "identity", "range": f"bytes={start}-{stop - 1}"}
            if origin(address) == origin(self._url):
                headers = {**self._headers, **headers}
            with asked(address, headers=headers, patience=patience) as response:
                if response.has_redirect_location:
                    address = self._redirected(address, response)
                    patience.drain(response)
                    continue
                self._accept(response, address, start, whole=whole)
                self._address = address
                yield response
                return
        raise CheckpointError(self.name, f"more than {HOPS} redirects", fix=DOWNLOAD)

    def _redirected(self, address: str, response: Response) -> str:
        told = response.headers.get("x-linked-etag", "").strip('"')
        if self._sha256 and told and told != self._sha256:
            raise self._changed("the hub now lists another hash")
        return redirected(self.name, address, response=response)

    def _accept(self, response: Response, address: str, start: int, *, whole: bool) -> None:
        """Raise unless the body is the requested bytes."""
        status, headers = response.status_code, response.headers
        if status in BUSY:
            raise Busy(response)
        if status in _GONE and origin(address) != origin(self._url):
            self._address = self._url
            raise _Expired(f"{urlsplit(address).hostname} refuses the hub's link (HTTP {status})")
        if status == 416:
            raise self._changed(f"it ends before byte {start:,}")
        if status not in (200, 206):
            raise refusal(self.name, response)
        if status == 200 and not whole:  # stop here instead of fetching the whole file
            reason = f"{urlsplit(address).hostname} can't send parts of a file"
            raise CheckpointError(self.name, reason, fix=DOWNLOAD)
        if headers.get("content-encoding", "identity") != "identity":
            raise CheckpointError(self.name, "the answer is compressed", fix=DOWNLOAD)
        self._same(response, origin(address), start)

    def _same(self, response: Response, host: str, start: int) -> None:
        headers = response.headers
        size, place = number(headers.get("content-length")), start
        if response.status_code == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("content-range", ""))
            if not found:
                raise CheckpointError(
                    self.name, "the answer does not say which part of the file it is", fix=DOWNLOAD
                )
            place, size = number(found[1]), number(found[2])
        if place != start:
            raise CheckpointError(self.name, f"asked for byte {start:,}, received byte {place:,}")
        if size not in (self.size, _UNTOLD):
            raise self._changed(f"the hub lists {self.size:,} bytes, the server has {size:,}")
        etag = headers.get("etag", "").removeprefix("W/")
        if etag and self._etags.setdefault(host, etag) != etag:
            raise self._changed("its ETag changed")

    def _changed(self, how: str) -> CheckpointError:
        return CheckpointError(self.name, f"changed while it was read: {how}", fix="Run it again")


@contextmanager
def asked(address: str, *, headers: Mapping[str, str], patience: Patience) -> Iterator[Response]:
    """Yield the answer of an address before its body is read; redirects are not followed."""
    from huggingface_hub import close_session, get_session

    # The timeout covers one read only: headers that arrive byte by byte would never end.
    watch = threading.Timer(patience.left, close_session)
    watch.daemon = True
    watch.start()
    sent: dict[str, Any] = {"headers": headers, "timeout": patience.timeout, "follow_redirects": False}
    try:
        with get_session().stream("GET", address, **sent) as response:
            watch.cancel()
            yield response
    finally:
        watch.cancel()


def redirected(name: str, address: str, *, response: Response) -> str:
    """Return the target of a redirect; raises `CheckpointError` unless it is http(s) and no less safe."""
    target: str = urljoin(address, response.headers["location"])
    allowed = ("https",) if address.startswith("https:") else ("http", "https")
    if urlsplit(target).scheme not in allowed:
        raise CheckpointError(name, "redirected to an address that is not http or https", fix=DOWNLOAD)
    return target


def number(told: str | None) -> int:
    """Parse a number in a header; returns a very large one if there is none."""
    return int(told) if told and told.isdecimal() and len(told) < 19 else _UNTOLD


def origin(url: str) -> str:
    """Return scheme and host of an address, without password: only this origin gets the token."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".lower()


class _Expired(Exception):
    """A CDN refuses a signed address that the hub gave."""
