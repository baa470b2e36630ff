"""The verb `diff`: a table for people, or one strict JSON document for machines."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from affectlens.cli.text import tell_drift
from affectlens.printable import seen, sentence

if TYPE_CHECKING:
    from affectlens.checkpoints import Look
    from affectlens.lens import Verification


@dataclass(frozen=True)
class Asked:
    """What to compare, and how closely; the names are those of `affectlens.diff`."""

    base: str
    tuned: str
    control: str | None
    preset: str | None
    alpha: float | None
    detail: str | None
    spectra: int | None
    align: bool


def compare(asked: Asked, *, by: str, output: Path | None, as_json: bool) -> None:
    """Diff, save where asked, and print."""
    from affectlens.drift import diff
    from affectlens.drift.diffing import refuse_unrelated
    from affectlens.table_formats import records

    drift = refuse_unrelated(diff(**asdict(asked)))
    if output is not None:
        drift.save(output)
    if as_json:
        tables = {"by": records(drift.by(by)), "ledger": records(drift.ledger)}
        document = {**tables, "findings": drift.findings, "origin": drift.origin}
        print(json.dumps(document, indent=2, allow_nan=False))
        return
    print("\n".join(tell_drift(drift, by)))
    if output is not None:
        print(f"\nThe table is in {seen(str(output))}.")


def inspect(source: str, *, as_json: bool, verify: bool, trust_remote_code: bool) -> None:
    """Print what `source` is, or one JSON record a tensor; raises `CheckpointError`, `RoleRefuted`."""
    from affectlens.checkpoints import look

    found = look(source)
    verified = _verified(found, source, trust_remote_code=trust_remote_code) if verify else None
    if as_json and verified is not None:
        verified.check()  # before anything is printed: who reads JSON gets all of it or nothing
    if as_json:
        # One write for all: a line at a time costs more than laying them out.
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
