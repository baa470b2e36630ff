"""The verb `diff`: a table for people, or one strict JSON document for machines."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from affectlens.cli.telling import tell_drift
from affectlens.html import seen


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
    from affectlens.drift.finding import refuse_unrelated
    from affectlens.formats import records

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
