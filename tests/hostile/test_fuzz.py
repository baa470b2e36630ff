"""Files that nobody wrote by hand: whatever is in them, they open or are a clear error."""

import gzip
import io
import json
import struct
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file
from safetensors.torch import save as save_torch
from torch import Tensor

from tests.hostile.corpus.adapters import CONFIG
from tests.hostile.fuzzing import PROGRAMS, changed, compared, fuzzed, looked, spliced, tensors, written
from tests.hostile.pickling import zipped

DATA = Path(__file__).parents[1] / "sites" / "data"
MODELS: dict[str, Any] = {
    name: model
    for file in ("architectures.json.gz", "remote.json.gz")
    for name, model in json.loads(gzip.decompress((DATA / file).read_bytes())).items()
}

HEADER = {
    "__metadata__": {"format": "pt"},
    "model.layers.0.mlp.gate_proj.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "model.layers.0.mlp.up_proj.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [24, 36]},
    "model.norm.weight": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [36, 37]},
}
INDEX = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(HEADER, "a.safetensors")}

MODEL = {f"layers.0.mlp.{role}_proj.weight": np.ones((3, 4), "float32") for role in ("gate", "up")}
LORA = {
    f"base_model.model.layers.0.mlp.{role}_proj.{factor}": shape
    for role, factor, shape in (
        ("gate", "lora_A.weight", (2, 4)),
        ("gate", "lora_B.weight", (3, 2)),
        ("up", "lora_A.weight", (2, 4)),
        ("up", "lora_B.weight", (3, 2)),
        ("up", "lora_magnitude_vector", (3,)),
    )
}
ADAPTER = {
    **CONFIG,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {"gate_proj": 2},
    "alpha_pattern": {"up_proj": 8},
    "modules_to_save": ["lm_head"],
    "layer_replication": None,
    "target_parameters": ["mlp.experts.gate_up_proj"],
}
SHAPES = st.dictionaries(st.sampled_from(sorted(LORA)), st.lists(st.integers(0, 4), max_size=4))


def torch_file(*, old: bool) -> bytes:
    """What torch writes, now or before 1.6."""
    model = OrderedDict({name: torch.from_numpy(value) for name, value in MODEL.items()})
    saved = {"epoch": 1, "model": model, "optimizer": {"state": {0: torch.ones(2)}, "lr": [0.1]}}
    stream = io.BytesIO()
    torch.save(saved, stream, _use_new_zipfile_serialization=not old)
    return stream.getvalue()


def safetensors(header: bytes) -> bytes:
    """A file with this header, over data of the right size."""
    return struct.pack("<Q", len(header)) + header + bytes(37)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The weights of every labelled architecture, without a config."""
    found, rng = {}, np.random.default_rng(0)
    for name, model in MODELS.items():
        rows = model.get("disk") or model["tensors"]
        weights = {row["disk"]: rng.standard_normal(row["shape"]).astype("float16") for row in rows}
        found[name] = tmp_path_factory.mktemp(name) / "model.safetensors"
        save_file(weights, found[name])
    return found


@fuzzed(60)
@given(st.data())
def test_any_config_opens_or_is_a_clear_error(models: dict[str, Path], data: st.DataObject) -> None:
    """A config of a real model with anything in the place of some of its values."""
    name = data.draw(st.sampled_from(sorted(models)))
    config = MODELS[name]["config"] or {}
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / side for side in ("base", "tuned")]
        for folder in folders:
            folder.mkdir()
            (folder / "model.safetensors").hardlink_to(models[name])
            (folder / "config.json").write_text(json.dumps(data.draw(changed(config))))
        looked(folders[0])
        compared(*folders)


@fuzzed(60)
@given(st.binary(max_size=300) | changed(HEADER).map(json.dumps).map(str.encode).flatmap(spliced))
def test_any_header_opens_or_is_a_clear_error(header: bytes) -> None:
    """Bytes of any kind, and a header with anything in the place of some of its values or bytes."""
    with written(model__safetensors=safetensors(header)) as folder:
        looked(folder)
    with written(model__safetensors=header) as folder:
        looked(folder)


@fuzzed(60)
@given(changed(HEADER))
def test_any_entry_opens_or_is_a_clear_error(header: dict[str, Any]) -> None:
    """A header of valid JSON."""
    with written(model__safetensors=safetensors(json.dumps(header).encode())) as folder:
        looked(folder)
        compared(folder, folder)


@fuzzed(40)
@given(changed(INDEX))
def test_any_index_opens_or_is_a_clear_error(index: dict[str, Any]) -> None:
    """An index with anything in the place of some of its values."""
    shard = safetensors(json.dumps(HEADER).encode())
    with written(a__safetensors=shard, model__safetensors__index__json=json.dumps(index).encode()) as folder:
        looked(folder)


@fuzzed(60)
@given(changed(ADAPTER), SHAPES)
def test_any_adapter_opens_or_is_a_clear_error(config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """An adapter's config with anything in the place of some values, and factors of any shape."""
    factors = save({name: np.ones(shapes.get(name, shape), "float32") for name, shape in LORA.items()})
    told = json.dumps(config).encode()
    with (
        written(adapter_model__safetensors=factors, adapter_config__json=told) as adapter,
        written(model__safetensors=save(MODEL)) as base,
    ):
        looked(adapter)
        compared(base, adapter)


@fuzzed(80)
@given(st.sampled_from([torch_file(old=False), torch_file(old=True)]).flatmap(spliced))
def test_any_torch_file_opens_or_is_a_clear_error(content: bytes) -> None:
    """What torch wrote with some bytes changed: of the directory, the pickle or the values."""
    with written(pytorch_model__bin=content) as folder:
        looked(folder)
        compared(folder, folder)


@fuzzed(80)
@given(PROGRAMS)
def test_any_pickle_opens_or_is_a_clear_error(program: list[bytes]) -> None:
    """Instructions in any order."""
    with written() as folder:
        zipped(folder / "pytorch_model.bin", b"".join(program) + b".")
        looked(folder)


@fuzzed(60)
@given(st.tuples(tensors(), tensors(), tensors()))
def test_any_models_compare_or_are_a_clear_error(sides: tuple[dict[str, Tensor], ...]) -> None:
    """Weights of any shape, dtype and values on any side: base, tuned and control."""
    config = json.dumps({"num_attention_heads": 2}).encode()
    base, tuned, control = (
        {"model__safetensors": save_torch(side), "config__json": config} for side in sides
    )
    with written(**base) as one, written(**tuned) as two, written(**control) as three:
        looked(one)
        compared(one, two, spectra=2, align=True)
        compared(one, two, control=three)
