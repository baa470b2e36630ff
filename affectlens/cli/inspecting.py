"""`affectlens inspect`: what a checkpoint is, where its parameters are, whether they do as named."""

import json
import sys
from typing import TYPE_CHECKING, Any

from affectlens.html import plain

if TYPE_CHECKING:
    from affectlens.checkpoints import Checkpoint


def inspect(source: str, *, as_json: bool, verify: bool) -> None:
    """Print what `source` is, or one JSON record a tensor; raises `CheckpointError`, `RoleRefuted`."""
    from affectlens.checkpoints import look

    found = look(source)
    if as_json:
        # One write for all: a line at a time costs more than laying them out.
        sys.stdout.write("".join(json.dumps(row) + "\n" for row in found.records()))
    else:
        print("\n".join(f"{name:12} {plain(value)}" for name, value in found.lines()))
        print("\n" + "\n".join(found.tree()))
    if verify:
        _verify(found.checkpoint, source, quiet=as_json)


def _verify(checkpoint: "Checkpoint | None", source: str, *, quiet: bool) -> None:
    from affectlens.errors import CheckpointError
    from affectlens.lens import load

    if checkpoint is None:
        raise CheckpointError(source, "an adapter has no forward pass to verify", fix="Verify its base")
    result: Any = load(checkpoint, dtype="float32").verify()
    if not quiet:
        print(f"\n{result}")
    result.check()
