"""A file on a hub, read as one here is: by its place, a range at a time, and nothing is kept.

    hub address ── 302 ──▶ signed address at a CDN ── 206 ──▶ the caller's buffer

The signed address serves until it expires, then the hub is asked for another. The token goes to the hub
alone. A line that breaks goes on at the byte it reached; one that gives nothing ends in an error.
"""

import re
import sys
import threading
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urljoin, urlsplit

from affectlens.checkpoints.hub.answers import BUSY, DOWNLOAD, Busy, failures, offline, refusal, said
from affectlens.errors import CheckpointError

PATIENCE = 25.0  # seconds without progress until it is given up
ATTEMPT = 10.0  # seconds without a byte until the line is taken for dead
BACKOFF = 0.5  # seconds before the second try; doubled for each after it
FIRST = 256 * 1024  # bytes that are read ahead: most headers are shorter

_PROGRESS = 64 * 1024  # bytes; a line that trickles would otherwise never be given up
HOPS = 5
_UNTOLD = sys.maxsize  # a size that the server does not tell
_GONE = (401, 403, 404, 410)  # what a CDN says to an address that has expired


class Patience:
    """Let a hub fail and stall for a while: tries come further and further apart, then an error."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin()

    @property
    def left(self) -> float:
        """Seconds until it is given up."""
        return max(0.01, self._until - time.monotonic())

    @property
    def timeout(self) -> float:
        """Seconds that the next read may take."""
        return min(ATTEMPT, self.left)

    def heard(self, count: int) -> None:
        """Count bytes that came; enough of them and the clock starts again. Raises `CheckpointError`."""
        self._bytes += count
        if self._bytes >= _PROGRESS:
            self._begin()
        elif time.monotonic() > self._until:
            raise self._given_up(f"only {self._bytes:,} bytes")

    def drain(self, response: Any) -> None:
        """Read the short rest of an answer: a line is used again only when its answer was read."""
        if number(response.headers.get("content-length")) < _PROGRESS:
            for chunk in response.iter_raw():  # as it came: unpacked it could be of any size
                self.heard(len(chunk))

    def retry(self, why: str, *, after: float = 0.0) -> None:
        """Wait before the next try, or raise `CheckpointError` where none is left."""
        self._wait *= 2
        wait = max(self._wait, after)
        if time.monotonic() + wait > self._until:
            raise self._given_up(why)
        time.sleep(wait)

    def _begin(self) -> None:
        self._until, self._wait, self._bytes = time.monotonic() + PATIENCE, BACKOFF / 2, 0

    def _given_up(self, why: str) -> CheckpointError:
        passed = PATIENCE - (self._until - time.monotonic())
        reason = f"the hub gives nothing ({why}); given up after {passed:.0f} s"
        return CheckpointError(self._name, reason, fix=f"Check the network and run it again. {DOWNLOAD}")


class RemoteFile:
    """A file at an address that answers to ranges of bytes.

    `size` and `sha256` (or `etag`, where the hub tells no hash) are what the hub lists; `headers` hold
    the token. Nothing is asked until something is fetched.
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
        self.size, self.name = size, origin(url) + urlsplit(url).path  # for people: no password, no query
        self.fetched = 0  # bytes received
        self._url, self._sha256, self._etag, self._headers = url, sha256, etag, dict(headers or {})
        self._address = url
        self._etags: dict[str, str] = {}  # of each host that answered
        self._first = b""
        self._lock = threading.Lock()

    @property
    def key(self) -> Hashable:
        """The hash of the content, where the hub tells it: equal in every repository that holds it."""
        if self._sha256:
            return "sha256", self._sha256
        return "etag", origin(self._url), self._etag or self._url

    def fetch(self, start: int, stop: int, *, into: memoryview) -> memoryview:
        """Read into the buffer, from the hub."""
        wanted = into[: stop - start]
        ahead = self._first[start:stop]
        wanted[: len(ahead)] = ahead
        if len(ahead) < len(wanted):
            self._receive(start + len(ahead), wanted[len(ahead) :])
        return wanted

    def check(self) -> None:
        """Nothing is left to ask: each answer was held against the one before as it came."""

    def read_ahead(self) -> None:
        """Fetch the first block once, so that a header costs one request and not two."""
        block = bytearray(min(FIRST, self.size))
        self._receive(0, memoryview(block))
        self._first = bytes(block)

    def forget(self) -> None:
        """Let go of what was read ahead: hundreds of shards would add up."""
        self._first = b""

    def _receive(self, start: int, into: memoryview) -> None:
        from huggingface_hub.errors import OfflineModeIsEnabled

        patience, whole = Patience(self.name), len(into) == self.size
        done, reached, renewed = 0, 0, False
        while done < len(into):
            why, after = "the answer was cut short", 0.0
            try:
                # A link that was refused is not taken again, even if another thread puts it back.
                address = self._url if renewed else self._address
                part = (start + done, start + len(into))
                with self._answer(address, part, whole=whole, patience=patience) as answer:
                    done = done if answer.status_code == 206 else 0  # no part: it begins at 0 again
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
            raise self._changed("more came than the hub lists")
        into[done:end] = chunk
        return end

    @contextmanager
    def _answer(
        self, address: str, part: tuple[int, int], *, whole: bool, patience: Patience
    ) -> Iterator[Any]:
        """The answer whose body holds a part of the file, redirects followed."""
        start, stop = part
        for _ in range(HOPS):
            # Compressed, the bytes would no longer lie where the header says.
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

    def _redirected(self, address: str, response: Any) -> str:
        told = response.headers.get("x-linked-etag", "").strip('"')
        if self._sha256 and told and told != self._sha256:
            raise self._changed("the hub tells another hash")
        return redirected(self.name, address, response=response)

    def _accept(self, response: Any, address: str, start: int, *, whole: bool) -> None:
        """Raise where the body is not the bytes that were asked for."""
        status, headers = response.status_code, response.headers
        if status in BUSY:
            raise Busy(response)
        if status in _GONE and origin(address) != origin(self._url):
            self._address = self._url
            raise _Expired(f"{urlsplit(address).hostname} refuses what the hub sent us for (HTTP {status})")
        if status == 416:
            raise self._changed(f"it ends before byte {start:,}")
        if status not in (200, 206):
            raise refusal(self.name, response)
        if status == 200 and not whole:  # stop here rather than fetch all of it
            reason = f"{urlsplit(address).hostname} can't give a part of a file"
            raise CheckpointError(self.name, reason, fix=DOWNLOAD)
        if headers.get("content-encoding", "identity") != "identity":
            raise CheckpointError(self.name, "the answer came compressed", fix=DOWNLOAD)
        self._same(response, origin(address), start)

    def _same(self, response: Any, host: str, start: int) -> None:
        headers = response.headers
        size, place = number(headers.get("content-length")), start
        if response.status_code == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("content-range", ""))
            if not found:
                raise CheckpointError(self.name, "a part came without its place in the file", fix=DOWNLOAD)
            place, size = number(found[1]), number(found[2])
        if place != start:
            raise CheckpointError(self.name, f"byte {start:,} was asked for, byte {place:,} came")
        if size not in (self.size, _UNTOLD):
            raise self._changed(f"the hub lists {self.size:,} bytes, {size:,} are there")
        etag = headers.get("etag", "").removeprefix("W/")
        if etag and self._etags.setdefault(host, etag) != etag:
            raise self._changed("its ETag is another")

    def _changed(self, how: str) -> CheckpointError:
        return CheckpointError(self.name, f"changed while it was read: {how}", fix="Run it again")


class _Expired(Exception):
    pass


@contextmanager
def asked(address: str, *, headers: Mapping[str, str], patience: Patience) -> Iterator[Any]:
    """The answer of an address, its body still to be read; no redirect is followed."""
    from huggingface_hub import close_session, get_session

    # The timeout is that of a read: headers that come byte by byte would never end.
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


def redirected(name: str, address: str, *, response: Any) -> str:
    """The address an answer sends us to. Raises `CheckpointError` for no web address, or a less safe one."""
    target: str = urljoin(address, response.headers["location"])
    allowed = ("https",) if address.startswith("https:") else ("http", "https")
    if urlsplit(target).scheme not in allowed:
        raise CheckpointError(name, "redirected to what is no web address", fix=DOWNLOAD)
    return target


def number(told: str | None) -> int:
    """A number in a header; a very large one where there is none."""
    return int(told) if told and told.isdecimal() and len(told) < 19 else _UNTOLD


def origin(url: str) -> str:
    """The scheme and host of an address, no password: who gets the token."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".lower()
