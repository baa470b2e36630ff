"""Architectures labelled by hand, tensor by tensor: fifteen of transformers', and some with remote code."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from affectlens.sites import Laid, lay_out, record

DATA = json.loads(gzip.decompress((Path(__file__).parent / "data" / "architectures.json.gz").read_bytes()))
REMOTE = json.loads(gzip.decompress((Path(__file__).parent / "data" / "remote.json.gz").read_bytes()))
CASES = [(name, layout) for name in DATA for layout in ("disk", "memory")]


def laid(name: str, layout: str) -> dict[str, Laid]:
    shapes = {row["disk"]: tuple(row["shape"]) for row in DATA[name][layout]}
    return lay_out(shapes, DATA[name]["config"])


def part_of_each_index(fused: dict[str, Any] | None) -> tuple[int, list[str]] | None:
    """Return the role of each index along the fused dimension."""
    if fused is None:
        return None
    period = fused.get("period", fused["size"])
    roles = [""] * period
    for part in fused["slices"]:
        roles[part["start"] : part["stop"]] = [part["role"]] * (part["stop"] - part["start"])
    return fused["dim"], roles * (fused["size"] // period)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_tensor_is_named_truly(name: str, layout: str) -> None:
    """Tower, layer and role of each tensor agree with the labels that a reader of the code gave."""
    found = laid(name, layout)

    for row in DATA[name][layout]:
        at = found[row["disk"]].place
        assert (row["tower"], row["layer"]) == (at.position.tower, at.position.layer), row["disk"]
        assert at.role in row["accepted"], row["disk"]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_record_says_how_it_is_stored(name: str, layout: str) -> None:
    """Slices, experts, blocks, stacks and transposes of each tensor agree with the labels, as JSON."""
    found = laid(name, layout)

    for row in DATA[name][layout]:
        ours = record(row["disk"], found[row["disk"]], dtype="float32")
        assert part_of_each_index(row["fused"]) == part_of_each_index(ours["fused"]), row["disk"]
        for key in ("stack", "expert", "block"):
            assert row[key] == ours[key], (row["disk"], key)
        if ours["block"] is None:
            assert row["transposed"] == ours["transposed"], row["disk"]


@pytest.mark.parametrize("name", REMOTE)
def test_remote_code_is_named_truly(name: str) -> None:
    """Names of the published files of models with their own code, at tiny sizes, are labelled correctly."""
    rows = REMOTE[name]["tensors"]
    found = lay_out({row["disk"]: tuple(row["shape"]) for row in rows}, REMOTE[name]["config"])

    for row in rows:
        at = found[row["disk"]].place
        assert at.position.tower in row["towers"], row["disk"]
        assert (row["layer"], True) == (at.position.layer, at.role in row["roles"]), (row["disk"], at.role)
        ours = record(row["disk"], found[row["disk"]], dtype="float32")
        assert part_of_each_index(row["fused"]) == part_of_each_index(ours["fused"]), row["disk"]
