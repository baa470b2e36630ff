"""What a hub means by an answer that gives nothing, in words: what is wrong and what to do."""

import sys
from typing import Any

from affectlens.errors import CheckpointError

DOWNLOAD = "Download it first with `hf download OWNER/NAME`"
BUSY = (408, 425, 429, 500, 502, 503, 504)
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN"
# What the hub says, as a code in a header or as a status → what it means, what to do.
_REFUSALS = {
    "GatedRepo": ("the repository is gated", f"Ask for access on its page. {_LOGIN}"),
    "RepoNotFound": ("the hub knows no such repository, or it is private", f"Is the name right? {_LOGIN}"),
    "RevisionNotFound": ("the repository has no such revision", "Its page lists branches, tags and commits"),
    "EntryNotFound": ("the repository has no such file at this revision", "Its page lists the files"),
    "401": ("private, gated or not there: the hub gives it to no one unknown", _LOGIN),
    "403": ("the hub refuses: gated, private, or the token may not read it", f"Ask for access. {_LOGIN}"),
    "404": ("the hub knows no such repository, revision or file", "Is the name right?"),
}


class Busy(Exception):
    """A refusal that may pass: try again, `after` some seconds."""

    def __init__(self, response: Any) -> None:
        told = response.headers.get("retry-after")
        self.after = float(told) if told and told.isdecimal() else 0.0
        Exception.__init__(
            self, f"HTTP {response.status_code}" + (f", ask in {told} s" if self.after else "")
        )


def refusal(name: str, response: Any) -> CheckpointError:
    """What an answer of the hub means that gives nothing."""
    code, status = response.headers.get("x-error-code", ""), str(response.status_code)
    reason, fix = _REFUSALS.get(code) or _REFUSALS.get(status) or (f"HTTP {status}", DOWNLOAD)
    return CheckpointError(name, reason, fix=fix)


def offline(name: str) -> CheckpointError:
    """The error for what is asked of a hub that is switched off."""
    reason = "no such file or folder here, nor in the hub's cache, and HF_HUB_OFFLINE forbids asking the hub"
    return CheckpointError(name, reason, fix="Unset HF_HUB_OFFLINE, or download it first with `hf download`")


def failures() -> tuple[type[Exception], ...]:
    """What a line raises when it breaks, or is closed under us by another user of the session."""
    from huggingface_hub.errors import HfHubHTTPError

    # huggingface_hub speaks through httpx, since 2.0 through httpx2; its errors tell which.
    base = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    library = sys.modules[base.__module__.partition(".")[0]]
    return base, library.InvalidURL, RuntimeError


def said(error: Exception) -> str:
    """The first line of what a failure says, or its name."""
    return str(error).partition("\n")[0] or type(error).__name__
