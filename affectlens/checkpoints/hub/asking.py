"""Ask a hub's API a question: one JSON object comes back, of a bounded size and in a bounded time."""

from typing import Any

from affectlens.checkpoints.hub.refusing import BUSY, DOWNLOAD, Busy, failures, offline, refusal, said
from affectlens.checkpoints.hub.remote import HOPS, Patience, asked, origin, redirected
from affectlens.checkpoints.parsing import JSON_LIMIT, parse
from affectlens.errors import CheckpointError


def ask(name: str, url: str, *, headers: dict[str, str]) -> dict[str, Any]:
    """Ask what is at an address of a hub; `name` is what errors call it. Raises `CheckpointError`.

    A hub that fails is asked again for a while. The headers, which hold the token, go to its host alone.
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


def _read(name: str, response: Any, *, patience: Patience) -> bytes:
    """The whole of an answer, as it came: unpacked, a short one could fill the memory."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise CheckpointError(name, "the answer came compressed", fix=DOWNLOAD)
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
        raise CheckpointError(name, f"{origin(url)} answers, but not as a hub does") from None
