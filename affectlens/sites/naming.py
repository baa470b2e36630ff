"""Canonical names: what transformers calls a parameter in memory, whatever the file calls it.

Training frameworks wrap names, and a multimodal model saved by different releases differs in where
the language model hangs. Both are undone by rewriting strings; no model and no config is built.
"""

import re
from collections.abc import Iterable

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|base_model\.model\.)+")
_MULTIMODAL = re.compile(
    r"^(?:model\.)?(?:visual|vision_tower|audio_tower|multi_modal_projector|language_model)\."
)
_PARTS = r"(?:visual|vision_tower|audio_tower|multi_modal_projector|language_model)\."

# Applied in this order, each to what the one before it left.
_LAYOUT = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
        (rf"^({_PARTS})", r"model.\1"),
        (r"^(model\.(?:vision_tower|audio_tower)\.)(?:vision_model|audio_model)\.", r"\1"),
    )
)


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Map each name to the canonical one.

    >>> canonical(["language_model.model.norm.weight", "vision_tower.post_layernorm.bias"])
    {'language_model.model.norm.weight': 'model.language_model.norm.weight', \
'vision_tower.post_layernorm.bias': 'model.vision_tower.post_layernorm.bias'}
    """
    bare = {name: _WRAPPERS.sub("", name) for name in names}
    if not any(_MULTIMODAL.match(name) for name in bare.values()):
        return bare
    return {name: _in_memory(stripped) for name, stripped in bare.items()}


def _in_memory(name: str) -> str:
    for pattern, replacement in _LAYOUT:
        name = pattern.sub(replacement, name)
    return name
