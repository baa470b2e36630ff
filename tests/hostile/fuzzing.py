"""Inputs of the fuzz tests: JSON with anything in it, bytes with some of them changed, random pickles.

Each property is tried on a few dozen files, the same ones each time; AFFECTLENS_FUZZ=100 tries a hundred
times as many, and others each time.
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from affectlens.checkpoints import look
from affectlens.drift import diff
from affectlens.errors import AffectlensError
from tests.hostile.pickling import named

TIMES = int(os.environ.get("AFFECTLENS_FUZZ", "1"))
_SECONDS = 10  # that one file may take

# What people and attackers put where a number, a word or a section is expected.
_NUMBERS = (0, -1, 1, 2, 3, 10**9, 2**63, -(10**30), 0.5, 1e400, float("nan"), True)
_WORDS = (
    "",
    "4",
    "\u00e9",
    "\ud800",
    "<script>",
    "../../x",
    "\x1b[31m",
    "llama",
    "gpt_neox",
    "qwen2_vl",
    "x" * 2000,
)
_ODD = st.sampled_from([*_NUMBERS, *_WORDS, None, [], {}, [None], [[]]])
_TREES = st.recursive(
    _ODD | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_SETTINGS = (
    "model_type", "architectures", "auto_map", "text_config", "vision_config", "llm_config", "decoder",
    "num_attention_heads", "n_head", "heads", "num_key_value_heads", "head_dim", "attn_config", "kv_n_heads",
    "tie_word_embeddings", "quantization_config", "quant_method", "weight_block_size", "config_groups",
    "format", "multi_query", "new_decoder_architecture", "kv_lora_rank", "d_kv",
)  # fmt: skip
_CODES = [bytes([code]) for code in b"\x80NK\x88)]}(tae.usb\x85\x86\x87qhrjXUcRQ\x81GJM\x8a\x8c\x94\x95"]
_NAMES = (
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor",
    "torch._tensor._rebuild_from_type_v2", "collections.OrderedDict", "argparse.Namespace", "torch.float32",
    "builtins.bytearray", "_codecs.encode", "posix.system", "torch.FloatStorage",
)  # fmt: skip
PROGRAMS = st.lists(st.sampled_from(_CODES) | st.sampled_from(_NAMES).map(named) | st.binary(max_size=3))


_DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int8, torch.uint8, torch.uint16, torch.bool, torch.complex64),
)
_VALUES = (0.0, -0.0, 1.0, -3.0, 1e-40, 1e-20, 3e38, float("nan"), float("inf"), float("-inf"))
_ROLES = (
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "mlp.experts.up_proj",
)
_SHAPES = st.sampled_from([(8, 4), (4, 8), (4, 4)]) | st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Draw tensors of ordinary names, and of any shape, dtype and values."""
    found = {}
    for role in draw(st.lists(st.sampled_from(_ROLES), min_size=1, max_size=6, unique=True)):
        shape, dtype = draw(_SHAPES), draw(st.sampled_from(_DTYPES[:3]) | st.sampled_from(_DTYPES))
        values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 3))))
        if values.numel():
            values.reshape(-1)[draw(st.integers(0, values.numel() - 1))] = draw(st.sampled_from(_VALUES))
        found[f"model.layers.0.{role}.weight"] = values.to(dtype)
    return found


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """Run a test on a number of files, the same ones each time unless more are asked for."""
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=1000 * _SECONDS,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def changed(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """Replace up to three values of a JSON object by anything, or put something in."""
    found = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        part, key = _place(draw, found)
        value = copy.deepcopy(draw(_TREES))
        if isinstance(part, dict) and draw(st.booleans()):
            key = draw(st.sampled_from(_SETTINGS))
        if isinstance(part, list) and not part:
            part.append(value)
        else:
            part[key] = value
    return found


def _place(draw: st.DrawFn, part: Any) -> tuple[Any, Any]:
    """Draw a part of a tree, and a key or an index in it."""
    while True:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        key = draw(st.sampled_from(keys)) if keys else "new"
        inner = part[key] if keys else None
        if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
            return part, key
        part = inner


@st.composite
def spliced(draw: st.DrawFn, whole: bytes) -> bytes:
    """Replace, leave out, repeat or insert up to three runs of bytes."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(whole)))
        stop = min(start + draw(st.integers(0, 8)), len(whole))
        put = draw(st.binary(max_size=8) | st.just(whole[start : start + 40]))
        whole = whole[:start] + put + whole[stop:]
    return whole


@contextmanager
def written(**files: bytes) -> Iterator[Path]:
    """Write a folder with files of these names, two underscores for a dot."""
    with tempfile.TemporaryDirectory() as root:
        for name, content in files.items():
            (Path(root) / name.replace("__", ".")).write_bytes(content)
        yield Path(root)


@contextmanager
def _allowed() -> Iterator[None]:
    """Allow our own errors, if they can be printed, and the warnings of other packages."""
    try:
        yield
    except AffectlensError as error:
        text = str(error)
        text.encode()

        assert 3 >= len(text.splitlines())


def looked(path: Path) -> None:
    """Look at a checkpoint in every way, and print the result."""
    with _allowed():
        found = look(path)
        json.dumps([*found.lines(), *found.records()])
        ("\n".join(found.tree()) + repr(found.source)).encode()


def compared(base: Path, tuned: Path, **how: Any) -> None:
    """Diff two checkpoints, heads and neurons too."""
    with _allowed():
        drift = diff(base, tuned, detail="heads,neurons", progress=False, **how)
        repr(drift).encode()
        json.dumps(drift.origin, allow_nan=False)
