"""Files beside every input that no run may open: secrets, checkpoints, a pipe."""

import json
import os
import struct
from pathlib import Path

from tests.hostile.running import CANARY


def lay_decoys(root: Path) -> Path:
    """Fill `root/outside` with files that a hostile input may point to, and return it.

    `secret.txt`, `config.json`, `adapter_config.json`, `model.safetensors`, `shard.safetensors`, `pipe`;
    the first of the checkpoints lies in `root` as well.
    """
    outside = root / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(f"{CANARY}\n" * 8)
    for name in ("config.json", "adapter_config.json"):
        (outside / name).write_text(json.dumps({"model_type": CANARY, "peft_type": CANARY}))
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    header = json.dumps({f"model.layers.0.mlp.{CANARY}.weight": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(16)
    for file in (outside / "model.safetensors", outside / "shard.safetensors", root / "model.safetensors"):
        file.write_bytes(content)
    os.mkfifo(outside / "pipe")
    return outside
