"""Turn the refusals and failures of a hub into errors that say what is wrong and what to do."""

import sys
from collections.abc import Iterator, Mapping
from typing import Protocol

from affectlens.errors import CheckpointError

DOWNLOAD = "Download it first with `hf download OWNER/NAME`"
BUSY = (408, 425, 429, 500, 502, 503, 504)
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN"
# The hub's error code, or the HTTP status → what it means, what to do.
_REFUSALS = {
    "GatedRepo": ("the repository is gated", f"Ask for access on its page. {_LOGIN}"),
    "RepoNotFound": ("the repository does not exist, or is private", f"Is the name right? {_LOGIN}"),
    "RevisionNotFound": ("the repository has no such revision", "Its page lists branches, tags and commits"),
    "EntryNotFound": ("the repository has no such file at this revision", "Its page lists the files"),
    "401": ("the hub requires a login: the repository is private or gated, or does not exist", _LOGIN),
    "403": (
        "the hub refuses access: the repository is gated or private, or the token may not read it",
        f"Ask for access. {_LOGIN}",
    ),
    "404": ("the hub has no such repository, revision or file", "Is the name right?"),
}


class Response(Protocol):
    """An answer of a hub or CDN: the part of httpx's that is used, of whatever version."""

    status_code: int
    headers: Mapping[str, str]

    @property
    def has_redirect_location(self) -> bool:
        """Whether it is a redirect with a target."""
        ...

    def iter_raw(self) -> Iterator[bytes]:
        """Yield the body as received, without decompressing it."""
        ...


class Busy(Exception):
    """A refusal that may be temporary: try again, not before `after` seconds."""

    def __init__(self, response: Response) -> None:
        told = response.headers.get("retry-after")
        self.after = float(told) if told and told.isdecimal() else 0.0
        Exception.__init__(
            self, f"HTTP {response.status_code}" + (f", retry in {told} s" if self.after else "")
        )


def refusal(name: str, response: Response) -> CheckpointError:
    """Return the error for an answer by which the hub refuses a request."""
    code, status = response.headers.get("x-error-code", ""), str(response.status_code)
    reason, fix = _REFUSALS.get(code) or _REFUSALS.get(status) or (f"HTTP {status}", DOWNLOAD)
    return CheckpointError(name, reason, fix=fix)


def offline(name: str) -> CheckpointError:
    """Return the error for a request to the hub while HF_HUB_OFFLINE forbids it."""
    reason = (
        "no such file or folder, not in the hub's cache either, and HF_HUB_OFFLINE forbids asking the hub"
    )
    return CheckpointError(name, reason, fix="Unset HF_HUB_OFFLINE, or download it first with `hf download`")


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions of a broken connection, or of a session that another thread closed."""
    from huggingface_hub.errors import HfHubHTTPError

    # huggingface_hub uses httpx, and since 2.0 httpx2; the base of its own errors shows which.
    base = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    library = sys.modules[base.__module__.partition(".")[0]]
    return base, library.InvalidURL, RuntimeError


def said(error: Exception) -> str:
    """Return the first line of a failure's message, or its class name if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__
