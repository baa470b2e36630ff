"""A store that shows the files of Meta and Mistral (`consolidated.*`) as transformers stores the same model.

Names differ (`attention.wq` for `self_attn.q_proj`), and so does the order of rows in q and k: these files
rotate pairs of neighbouring rows of a head, transformers rotates the first half of a head against the second.
Without the number of heads the order is unknown; q and k are then left out.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from affectlens.checkpoints.bytes import Span
from affectlens.checkpoints.checkpoint import Checkpoint
from affectlens.checkpoints.store import Header, Store
from affectlens.sites import bare_name, heads, sections
from affectlens.sites.tower_configs import number

if TYPE_CHECKING:
    from torch import Tensor

_MARK = re.compile(r"(?P<prefix>model\.)?(?:vision_encoder\.transformer\.)?layers\.\d+\.attention\.w[qk]\.")
_TURNED = re.compile(_MARK.pattern + "(?!lora_A)")  # the rows of A's output are its rank
_VISION, _AUDIO = "vision_encoder.", "mm_whisper_embeddings."
_SLOTS = {
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^vision_encoder\.", "vision_tower."),
        (r"^vision_language_adapter\.w_in\.", "multi_modal_projector.linear_1."),
        (r"^vision_language_adapter\.w_out\.", "multi_modal_projector.linear_2."),
        (r"^pre_mm_projector_norm\.", "multi_modal_projector.norm."),
        (r"^patch_merger\.", "multi_modal_projector.patch_merger."),
        (rf"^{_AUDIO}tok_embeddings\.", "tok_embeddings."),
        (rf"^{_AUDIO}audio_language_projection\.0\.", "multi_modal_projector.linear_1."),
        (rf"^{_AUDIO}audio_language_projection\.2\.", "multi_modal_projector.linear_2."),
        (rf"^{_AUDIO}whisper_encoder\.", "audio_tower."),
        (r"^audio_tower\.conv_layers\.0\.", "audio_tower.conv1."),
        (r"^audio_tower\.conv_layers\.1\.", "audio_tower.conv2."),
        (r"^audio_tower\.transformer\.norm\.", "audio_tower.layer_norm."),
        (r"^audio_tower\.transformer\.", "audio_tower."),
        (r"^(audio_tower\..*)\.attention\.wo\.", r"\1.self_attn.out_proj."),
        (r"^(audio_tower\..*)\.attention\.", r"\1.self_attn."),
        (r"^(audio_tower\..*)\.attention_norm\.", r"\1.self_attn_layer_norm."),
        (r"^(audio_tower\..*)\.ffn_norm\.", r"\1.final_layer_norm."),
        (r"^(audio_tower\..*)\.feed_forward\.w([12])\.", r"\1.fc\2."),
        (r"^output\.", "lm_head."),
        (r"^tok_embeddings\.", "TEXT.embed_tokens."),
        (r"^(norm|layers)\.", r"TEXT.\1."),
        (r"^(TEXT.*)\.attention\.", r"\1.self_attn."),
        (r"^(TEXT.*)\.attention_norm\.", r"\1.input_layernorm."),
        (r"^(TEXT.*)\.ffn_norm\.", r"\1.post_attention_layernorm."),
        (r"^(TEXT.*)\.feed_forward\.(gate|experts)\.", r"\1.block_sparse_moe.\2."),
        (r"^(TEXT.*)\.feed_forward\.", r"\1.mlp."),
    )
)
_SLOT = re.compile(r"(?<=\.)(w[qkvo123])(?=\.)")
_WHY = (
    "its rows are in Meta's order, and no file says the number of heads, which gives transformers' order: "
    "put params.json beside it"
)


class MetaStore:
    """Show the tensors of a store under transformers' names, with the rows of q and k in its order.

    `sizes` has the length of a head of each tower, where it is known.
    """

    def __init__(self, store: Store, names: Mapping[str, str], *, sizes: Mapping[str, int]) -> None:
        self.inner = store
        self.name, self.source, self.format, self.notes = store.name, store.source, store.format, store.notes
        known = store.config if "model_type" in store.config else _heads_alone(store.config)
        self.config: Mapping[str, Any] = known
        self.aliases: Mapping[str, str] = {
            names.get(one, one): names.get(other, other) for one, other in store.aliases.items()
        }
        self._stored = {names[tensor]: tensor for tensor in store.headers}
        self._turned = {
            names[tensor]: sizes.get(_tower(tensor), 0) for tensor in store.headers if _turns(tensor)
        }
        lost = {
            m for name, size in self._turned.items() if not self._fits(name, size) for m in [_module(name)]
        }
        left_out = [name for name in self._stored if _module(name) in lost]
        self.headers: Mapping[str, Header] = {
            name: store.headers[tensor] for name, tensor in self._stored.items() if name not in left_out
        }
        self.skipped: Mapping[str, tuple[str, int]] = {
            **{names.get(tensor, tensor): why for tensor, why in store.skipped.items()},
            **{name: (_WHY, math.prod(store.headers[self._stored[name]].shape)) for name in left_out},
        }

    def _fits(self, name: str, size: int) -> bool:
        shape = self.inner.headers[self._stored[name]].shape
        return size > 0 and size % 2 == 0 and bool(shape) and shape[0] % size == 0

    def read(self, tensor: str, rows: slice | None = None) -> "Tensor":
        """Return a tensor, or some of its rows, in transformers' order."""
        stored, size = self._stored[tensor], self._turned.get(tensor)
        if size is None:
            return self.inner.read(stored, rows)
        import torch

        count = self.headers[tensor].shape[0]
        order = torch.arange(count).view(-1, size // 2, 2).mT.reshape(-1)
        wanted = order[rows] if rows is not None else order
        if not len(wanted):
            return self.inner.read(stored, slice(0, 0))
        first, last = int(wanted.min()), int(wanted.max()) + 1
        return self.inner.read(stored, slice(first, last))[wanted - first]

    def by_rows(self, tensor: str) -> bool:
        """Return whether some rows of a tensor can be read alone."""
        return self.inner.by_rows(self._stored[tensor])

    def span(self, tensor: str) -> Span | None:
        """Return where the values of a tensor are stored; None if its rows are in another order there."""
        return None if tensor in self._turned else self.inner.span(self._stored[tensor])

    def origin(self, tensor: str) -> Span | None:
        """Return where the opened files store a tensor; None if its rows are in another order there."""
        return None if tensor in self._turned else self.inner.origin(self._stored[tensor])

    def check(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        self.inner.check()

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts that identify the stored content."""
        return self.inner.facts


def in_meta_format(store: Store) -> bool:
    """Return whether the tensors of a store have the names of Meta's and Mistral's files."""
    return any(_MARK.match(bare_name(tensor)) for tensor in store.headers)


def as_transformers(store: Store, base: Checkpoint | None) -> MetaStore:
    """Return a store in Meta's format under transformers' names.

    The number of heads is that of the store's config or `params.json`, else that of `base`.
    """
    inside = base is not None and any(
        one.memory.startswith("model.language_model.") for one in base.laid.values()
    )
    several = inside or any(bare_name(tensor).startswith((_VISION, _AUDIO)) for tensor in store.headers)
    sizes: dict[str, int] = {}
    for config in (store.config, base.config if base is not None else {}):
        for tower, size in _sizes(store, config).items():
            sizes.setdefault(tower, size)
    return MetaStore(store, _names(store, "language_model.model" if several else "model"), sizes=sizes)


def lora_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a PEFT config with the scale that `params.json` states of a LoRA of mistral-finetune, or {}."""
    known = config.get("lora")
    rank, scaling = (
        (known.get(key) for key in ("rank", "scaling")) if isinstance(known, Mapping) else (0, None)
    )
    if type(rank) is not int or rank < 1 or not isinstance(scaling, int | float) or isinstance(scaling, bool):
        return {}
    return {"peft_type": "LORA", "r": rank, "lora_alpha": scaling * rank}


def _names(store: Store, text: str) -> dict[str, str]:
    """Map each name to transformers'; one that another tensor has already stays as it is."""
    marks = (_MARK.match(bare_name(tensor)) for tensor in store.headers)
    prefix = next((mark["prefix"] or "" for mark in marks if mark), "")
    names: dict[str, str] = {}
    taken: set[str] = set()
    for tensor in (*store.headers, *store.skipped, *store.aliases):
        name = _renamed(bare_name(tensor).removeprefix(prefix), text)
        names[tensor] = tensor if name in taken else name
        taken.add(names[tensor])
    return names


def _renamed(name: str, text: str) -> str:
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    if "experts" not in name and name.startswith(("TEXT.", "vision_tower.", "audio_tower.")):
        name = _SLOT.sub(lambda match: _SLOTS[match[1]], name)
    head = "language_model.lm_head." if text != "model" else "lm_head."
    return name.replace("TEXT.", f"{text}.", 1).replace("lm_head.", head, 1)


def _tower(tensor: str) -> str:
    return "vision" if bare_name(tensor).startswith(_VISION) else "language"


def _turns(tensor: str) -> bool:
    return _TURNED.match(bare_name(tensor)) is not None


def _module(name: str) -> str:
    return re.split(r"(?<=[qk]_proj)\.", name)[0]


def _sizes(store: Store, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the length of a head of each tower: as stated, or the rows of a q divided by its heads."""
    vision = config.get("vision_encoder")
    parts = {**sections(config, ["language", "vision"])}
    if isinstance(vision, Mapping):
        parts["vision"] = vision
    elif "vision_config" not in config:
        parts.pop("vision")
    found = {}
    for tower, part in parts.items():
        every, _ = heads(part)
        rows = {
            header.shape[0]
            for tensor, header in store.headers.items()
            if _tower(tensor) == tower and ".wq." in tensor and _turns(tensor) and header.shape
        }
        width = rows.pop() if len(rows) == 1 else number(part, "hidden_size", "dim")
        size = number(part, "head_dim")
        if size is None and every and width and width % every == 0:
            size = width // every
        if size:
            found[tower] = size
    return found


def _heads_alone(config: Mapping[str, Any]) -> dict[str, Any]:
    # The other settings of `params.json` have other names and defaults than those of a config.
    return {key: config[key] for key in ("n_heads", "n_kv_heads", "head_dim") if key in config}
