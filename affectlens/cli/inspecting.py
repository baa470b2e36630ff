"""`affectlens inspect`: what a checkpoint is, where its parameters are, whether they do as named."""

import json
import sys
from typing import TYPE_CHECKING, TextIO

from affectlens.html import plain

if TYPE_CHECKING:
    from affectlens.checkpoints import Look


def inspect(source: str, *, as_json: bool, verify: bool) -> None:
    """Print what `source` is, or one JSON record a tensor; raises `CheckpointError`, `RoleRefuted`."""
    from affectlens.checkpoints import look

    found = look(source)
    if as_json:
        # One write for all: a line at a time costs more than laying them out.
        sys.stdout.write("".join(json.dumps(row) + "\n" for row in found.records()))
    else:
        # A config comes from strangers: a line break in a value must not forge a line of ours.
        print("\n".join(f"{name:12} {' '.join(plain(value).split())}" for name, value in found.lines()))
        print("\n" + "\n".join(found.tree()))
    if verify:
        _verify(found, source, stream=sys.stderr if as_json else sys.stdout)


def _verify(found: "Look", source: str, *, stream: TextIO) -> None:
    from affectlens.checkpoints import Checkpoint
    from affectlens.errors import CheckpointError
    from affectlens.lens import load

    if not isinstance(found.source, Checkpoint):
        raise CheckpointError(source, "an adapter has no forward pass to verify", fix="Verify its base")
    result = load(found.source, dtype="float32").verify()
    print(f"\n{result}", file=stream)
    result.check()
