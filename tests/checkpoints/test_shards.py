"""If shards disagree with their index, one copy counts, the other is reported, and nothing is lost."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import affectlens as al
from affectlens.errors import CheckpointError
from tests.checkpoints.hub.hub_server import posing
from tests.hostile.writing import GATE, entry, index, model, packed, sharded, values, write

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
OTHER = np.full((16, 8), 7, np.float32)


@pytest.fixture(params=["here", "hub"])
def opened(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[Path], al.Checkpoint]]:
    """Return a function that opens a folder: on disk, or from a hub."""
    if request.param == "here":
        yield al.open_checkpoint
        return
    with posing(monkeypatch, cache=tmp_path / "cache") as hub:

        def pushed(folder: Path) -> al.Checkpoint:
            hub.push("lab/model", {file.name: file.read_bytes() for file in folder.iterdir()})
            return al.open_checkpoint("lab/model")

        yield pushed


def doubled(folder: Path, *, named: str | None) -> Path:
    """Return a model whose second shard also has the gate; the index places the gate in `named`."""
    weights, found = sharded(folder), values()
    second = {name: value for name, value in found.items() if weights[name] == SECOND}
    write(folder / SECOND, *packed({**second, GATE: OTHER}))
    del weights[GATE]
    index(folder, weights if named is None else {**weights, GATE: named})
    return folder


@pytest.mark.parametrize(
    ("named", "other", "value"), [(FIRST, SECOND, values()[GATE]), (SECOND, FIRST, OTHER)]
)
def test_of_two_copies_the_one_that_the_index_names_is_read(
    opened: Callable[[Path], al.Checkpoint], tmp_path: Path, named: str, other: str, value: np.ndarray
) -> None:
    """The other copy is reported, and its elements are part of the total."""
    checkpoint = opened(doubled(tmp_path / "model", named=named))

    site = checkpoint.sites.where(role="gate_proj", layer=0)[0]
    assert torch.equal(torch.from_numpy(value), checkpoint.read(site))
    why = "a second copy, in another file than the index says"
    assert {f"{GATE} in {other}": (why, 128)} == checkpoint.skipped
    assert sum(v.size for v in values().values()) + 128 == checkpoint.parameters
    assert f"1 tensors are skipped: {why} (first: '{GATE} in {other}')" in repr(checkpoint)


@pytest.mark.parametrize("named", [None, "model-00003-of-00003.safetensors"])
def test_where_no_index_decides_two_copies_are_an_error(
    opened: Callable[[Path], al.Checkpoint], tmp_path: Path, named: str | None
) -> None:
    """Two copies are an error if the index has neither, or names a third file without one."""
    folder = doubled(tmp_path / "model", named=named)
    write(folder / "model-00003-of-00003.safetensors", *packed({"model.extra.weight": OTHER}))

    with pytest.raises(
        CheckpointError, match=rf"tensor '{GATE}': stored in '{FIRST}' and '{SECOND}', and no index"
    ):
        opened(folder)


def test_the_ledger_holds_the_copy_that_was_not_read(tmp_path: Path) -> None:
    """The copy that was not read has a row in the ledger and a finding."""
    drift = al.diff(model(tmp_path / "base"), doubled(tmp_path / "tuned", named=FIRST), progress=False)

    row = drift.ledger.set_index("state").loc["skipped"]
    assert (0, 128) == (row["base_parameters"], row["tuned_parameters"])
    assert any("1 tensors of tuned were skipped: a second copy" in finding for finding in drift.findings)


def test_tensors_in_other_files_than_the_index_says_are_read_and_told(
    opened: Callable[[Path], al.Checkpoint], tmp_path: Path
) -> None:
    """Tensors in other files than the index says are read and reported."""
    weights = sharded(tmp_path / "model")
    index(tmp_path / "model", {**weights, GATE: SECOND})

    checkpoint = opened(tmp_path / "model")

    first = f"'{GATE}' is in '{FIRST}', not in '{SECOND}'"
    told = f"1 tensors are in other files than the index says (first: {first})."
    assert (told,) == checkpoint.store.notes
    assert len(values()) == len(checkpoint.laid)


def test_tensors_that_the_index_does_not_list_are_read_and_told(
    opened: Callable[[Path], al.Checkpoint], tmp_path: Path
) -> None:
    """Tensors that the index does not list are read and reported, since some loaders miss them."""
    weights = sharded(tmp_path / "model")
    del weights[GATE]
    index(tmp_path / "model", weights)

    checkpoint = opened(tmp_path / "model")

    told = f"1 stored tensors are not in the index (first: '{GATE}' in '{FIRST}')."
    assert (told,) == checkpoint.store.notes
    assert len(values()) == len(checkpoint.laid)


def test_an_index_that_places_a_tensor_twice_is_refused(
    opened: Callable[[Path], al.Checkpoint], tmp_path: Path
) -> None:
    """An index that lists a tensor twice is refused: two loaders would read different files."""
    sharded(tmp_path / "model")
    index(tmp_path / "model", f'{{"weight_map": {{"a": "{FIRST}", "b": "{FIRST}", "a": "{SECOND}"}}}}')

    with pytest.raises(CheckpointError, match="tensor 'a': the index lists it twice"):
        opened(tmp_path / "model")


def test_a_config_with_a_key_twice_is_told(opened: Callable[[Path], al.Checkpoint], tmp_path: Path) -> None:
    """Of a repeated key the last value counts, as in transformers, and it is reported."""
    folder = model(tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config[:-1] + ', "model_type": "qwen2"}')

    checkpoint = opened(folder)

    assert "qwen2" == checkpoint.config["model_type"]
    assert ("config.json has the key 'model_type' twice; the last one counts.",) == checkpoint.store.notes


def test_packed_floats_are_left_out_and_counted(tmp_path: Path) -> None:
    """Four-bit floats, for which torch has no dtype, are skipped with a row in the ledger."""
    header, data = packed(values())
    header["model.layers.0.mlp.packed"] = entry([2, 3], len(data), len(data) + 3, "F4")
    file = write(tmp_path / "model.safetensors", header, data + bytes(3))

    checkpoint = al.open_checkpoint(file)

    assert {"model.layers.0.mlp.packed": 6} == {name: size for name, (_, size) in checkpoint.skipped.items()}
    assert "F4" in checkpoint.skipped["model.layers.0.mlp.packed"][0]
