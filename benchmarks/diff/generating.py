"""Write checkpoints to compare: random bf16 in the layout of a language model, block by block.

Each tensor has its own generator, so a size has the same bytes on every machine with the same torch. The
base and its tunings are written in one pass, and at most one block of each is in memory.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
_SHARD = 2_000_000_000  # bytes
_BLOCK = 1 << 23  # elements
_PATCH = 3001  # elements that change, and as many that don't: borders fall anywhere in a block
_SPREAD, _STEP = 0.02, 0.0004  # of weights, and of their change: nearly every element moves

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of a decoder, which determine names and shapes."""

    kind: str  # llama or qwen2, whose q, k and v have biases
    hidden: int
    intermediate: int
    layers: int
    heads: int
    shared: int  # heads of keys and values
    vocabulary: int
    tied: bool

    @property
    def config(self) -> dict[str, object]:
        """Return the config from which transformers builds the model."""
        return {
            "architectures": ["Qwen2ForCausalLM" if self.kind == "qwen2" else "LlamaForCausalLM"],
            "model_type": self.kind,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.shared,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by its name, in the order of the files."""
        h, wide, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.shared
        inside: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (h,)}
        for name, out in (("q", h), ("k", kv), ("v", kv)):
            inside[f"self_attn.{name}_proj.weight"] = (out, h)
            if self.kind == "qwen2":
                inside[f"self_attn.{name}_proj.bias"] = (out,)
        inside |= {
            "self_attn.o_proj.weight": (h, h),
            "post_attention_layernorm.weight": (h,),
            "mlp.gate_proj.weight": (wide, h),
            "mlp.up_proj.weight": (wide, h),
            "mlp.down_proj.weight": (h, wide),
        }
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for layer in range(self.layers):
            found |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
        found["model.norm.weight"] = (h,)
        return found if self.tied else found | {"lm_head.weight": (self.vocabulary, h)}


LAYOUTS = {
    "small": Layout(
        kind="llama", hidden=64, intermediate=176, layers=2, heads=4, shared=2, vocabulary=512, tied=False
    ),
    "0.5b": Layout(
        kind="qwen2",
        hidden=896,
        intermediate=4864,
        layers=24,
        heads=14,
        shared=2,
        vocabulary=151_936,
        tied=True,
    ),
    "3b": Layout(
        kind="qwen2",
        hidden=2048,
        intermediate=11_008,
        layers=36,
        heads=16,
        shared=2,
        vocabulary=151_936,
        tied=True,
    ),
    "7b": Layout(
        kind="qwen2",
        hidden=3584,
        intermediate=18_944,
        layers=28,
        heads=28,
        shared=4,
        vocabulary=152_064,
        tied=False,
    ),
}
# Rows of 32k and an embedding of 136 million elements, with changed and identical runs in every tensor.
LONG = Layout(
    kind="qwen2",
    hidden=896,
    intermediate=32_768,
    layers=1,
    heads=14,
    shared=2,
    vocabulary=151_936,
    tied=True,
)


def generate(folder: Path, layout: Layout, *, tunings: tuple[str, ...], shard: int = _SHARD) -> None:
    """Write `base` and each tuning (`all`, `gate`, `patches`) into the folder, unless they are there."""
    sides = {name: folder / name for name in ("base", *tunings)}
    config = json.dumps(layout.config)
    if all(
        (side / INDEX).exists() and (side / "config.json").read_text() == config for side in sides.values()
    ):
        return
    for side in sides.values():
        side.mkdir(parents=True, exist_ok=True)
        (side / INDEX).unlink(missing_ok=True)
        (side / "config.json").write_text(config)
    shards = list(_shards(layout.shapes, shard))
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for name, shapes in zip(names, shards, strict=True):
        _write(name, shapes, sides)
    places = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
    index = {"metadata": {"total_size": size(layout)}, "weight_map": places}
    for side in sides.values():  # last: an index says that the rest is there
        (side / INDEX).write_text(json.dumps(index))


def size(layout: Layout) -> int:
    """Return the bytes of one side."""
    return 2 * sum(map(prod, layout.shapes.values()))


def _shards(shapes: Shapes, limit: int) -> Iterator[Shapes]:
    part: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if part and 2 * (sum(map(prod, part.values())) + prod(shape)) > limit:
            yield part
            part = {}
        part[name] = shape
    yield part


def _write(name: str, shapes: Shapes, sides: Mapping[str, Path]) -> None:
    """Write one shard of every side."""
    ends = [0]
    for shape in shapes.values():
        ends.append(ends[-1] + 2 * prod(shape))
    entries = {
        tensor: {"dtype": "BF16", "shape": list(shape), "data_offsets": list(place)}
        for (tensor, shape), place in zip(shapes.items(), pairwise(ends), strict=True)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with ExitStack() as stack:
        files = {side: stack.enter_context((path / name).open("wb")) for side, path in sides.items()}
        for file in files.values():
            file.write(len(header).to_bytes(8, "little") + header)
        for tensor, shape in shapes.items():
            for start, base, step in _blocks(tensor, prod(shape), norm="norm" in tensor):
                for side, file in files.items():
                    block = base if side == "base" else _tuned(side, tensor, start, base, step)
                    file.write(block.view(torch.uint8).numpy().data)


def _blocks(tensor: str, count: int, *, norm: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield values of base as stored, their change, and the position of the first."""
    generator = torch.Generator().manual_seed(zlib.crc32(tensor.encode()))
    for start in range(0, count, _BLOCK):
        length = min(_BLOCK, count - start)
        base = torch.randn(length, generator=generator).mul_(_SPREAD).add_(float(norm))
        # A norm's weights lie about 1, where steps of bf16 are larger.
        scale = _STEP / _SPREAD if norm else _STEP
        yield start, base.bfloat16(), torch.randn(length, generator=generator).mul_(scale)


def _tuned(tuning: str, tensor: str, start: int, base: Tensor, step: Tensor) -> Tensor:
    if tuning == "gate" and "gate_proj" not in tensor:
        return base
    if tuning == "patches":
        step = step * (torch.arange(start, start + len(step)) // _PATCH % 2)
    return (base.float() + step).bfloat16()
