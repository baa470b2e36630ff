"""Print what `inspect` and `diff` found: text for people, or strict JSON for programs."""

import json
import sys
from typing import TYPE_CHECKING

from affectlens.cli.text import tell_drift
from affectlens.printable import sentence

if TYPE_CHECKING:
    from affectlens.checkpoints import Look
    from affectlens.drift import Drift
    from affectlens.lens import Verification


def show_drift(drift: "Drift", *, by: str, as_json: bool) -> None:
    """Print the groups and the ledger of a drift."""
    from affectlens.table_formats import records

    if not as_json:
        print("\n".join(tell_drift(drift, by)))
        return
    tables = {"by": records(drift.by(by)), "ledger": records(drift.ledger)}
    document = {**tables, "findings": drift.findings, "origin": drift.origin}
    print(json.dumps(document, indent=2, allow_nan=False))


def inspect(source: str, *, as_json: bool, verify: bool, trust_remote_code: bool) -> None:
    """Print what `source` is, or one JSON record per tensor. Raises `CheckpointError`, `RoleRefuted`."""
    from affectlens.checkpoints import look

    found = look(source)
    verified = _verified(found, source, trust_remote_code=trust_remote_code) if verify else None
    if as_json and verified is not None:
        verified.check()  # before anything is printed: a program must get all of the JSON or none
    if as_json:
        # One write for all: line by line, printing takes longer than the rest.
        sys.stdout.write("".join(json.dumps(row) + "\n" for row in found.records()))
    else:
        print("\n".join(f"{name:12} {sentence(value)}" for name, value in found.lines()))
        print("\n" + "\n".join(found.tree()))
    if verified is not None:
        print(f"\n{verified}", file=sys.stderr if as_json else sys.stdout)
        verified.check()


def _verified(found: "Look", source: str, *, trust_remote_code: bool) -> "Verification":
    from affectlens.checkpoints import Checkpoint
    from affectlens.errors import CheckpointError
    from affectlens.lens import load

    if not isinstance(found.source, Checkpoint):
        raise CheckpointError(source, "an adapter has no forward pass to verify", fix="Verify its base")
    return load(found.source, dtype="float32", trust_remote_code=trust_remote_code).verify()
