"""Checkpoints to break, written by hand so that a case controls every byte."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
_LAYER = {
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (8, 8),
    "self_attn.v_proj": (8, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (16, 8),
    "mlp.up_proj": (16, 8),
    "mlp.down_proj": (8, 16),
}
GATE = "model.layers.0.mlp.gate_proj.weight"  # a tensor that every model here has

Values = dict[str, np.ndarray]


def values(*, seed: int = 0) -> Values:
    """Return the tensors of a tiny language model; with another seed, tensors near to them."""
    base, near = np.random.default_rng(0), np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{layer}.{name}.weight": shape for layer in (0, 1) for name, shape in _LAYER.items()
    }
    shapes |= {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,)}
    drawn = {name: base.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    moved = {
        name: np.float32(0.01 * (seed > 0)) * near.standard_normal(v.shape, np.float32)
        for name, v in drawn.items()
    }
    return {name: value + moved[name] for name, value in drawn.items()}


def packed(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, object], bytes]:
    """Return the header and the data of float32 tensors."""
    header: dict[str, object] = {}
    data = b""
    for name, value in tensors.items():
        part = value.astype("<f4").tobytes()
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        data += part
    return header, data


def entry(shape: object, start: object, stop: object, dtype: object = "F32") -> dict[str, object]:
    """Return an entry of a header, right or wrong."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write(file: Path, header: object, data: bytes = b"") -> Path:
    """Write a safetensors file; a header that is text or bytes is written unchanged."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return file


def model(folder: Path, tensors: Mapping[str, np.ndarray] | None = None, *, seed: int = 0) -> Path:
    """Write a model into one file, with its config."""
    write(folder / "model.safetensors", *packed(values(seed=seed) if tensors is None else tensors))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def sharded(folder: Path, *, seed: int = 0) -> dict[str, str]:
    """Write a model into two shards and return its index, which is written as well."""
    found = values(seed=seed)
    weights = {name: f"model-0000{1 + (at >= 8)}-of-00002.safetensors" for at, name in enumerate(found)}
    for file in sorted(set(weights.values())):
        write(folder / file, *packed({name: found[name] for name in found if weights[name] == file}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    index(folder, weights)
    return weights


def index(folder: Path, weights: object) -> Path:
    """Write an index; text is written unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.safetensors.index.json"
    file.write_text(weights if isinstance(weights, str) else json.dumps({"weight_map": weights}))
    return file
