"""Adapters of multimodal families that TransformerLens has none for: which of their modules is which.

Each is one of its own adapters, of the language model, told where that lies and where the towers are. Towers
are wrapped whole: a hook at what goes in and at what comes out.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

Adapter = Callable[[Any], "ArchitectureAdapter"]  # given TransformerLens's config of a model


def smolvlm(config: Any) -> "ArchitectureAdapter":
    """SmolVLM has the modules of Idefics3."""
    from transformer_lens.model_bridge.supported_architectures.idefics3 import Idefics3ArchitectureAdapter

    return Idefics3ArchitectureAdapter(config)


def internvl(config: Any) -> "ArchitectureAdapter":
    """InternVL has the modules of LLaVA, and a vision tower of its own."""
    from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter

    return _with_towers(LlavaArchitectureAdapter(config), vision_encoder="model.vision_tower")


def qwen2_vl(config: Any) -> "ArchitectureAdapter":
    """Qwen2-VL is a Qwen2 that turns positions in time, height and width."""
    return _with_towers(_qwen2_turning(config), vision_encoder="model.visual")


def qwen2_5_omni_thinker(config: Any) -> "ArchitectureAdapter":
    """The thinker of Qwen2.5-Omni: Qwen2-VL's language model, with a tower that hears."""
    towers = {"vision_encoder": "model.visual", "audio_encoder": "model.audio_tower"}
    return _with_towers(_qwen2_turning(config), **towers)


ADAPTERS: Mapping[str, Adapter] = {
    "SmolVLMForConditionalGeneration": smolvlm,
    "InternVLForConditionalGeneration": internvl,
    "Qwen2VLForConditionalGeneration": qwen2_vl,
    "Qwen2_5OmniThinkerForConditionalGeneration": qwen2_5_omni_thinker,
}


def _with_towers(adapter: "ArchitectureAdapter", **towers: str) -> "ArchitectureAdapter":
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    adapter.cfg.is_multimodal = True
    for name, module in towers.items():
        adapter.components[name] = GeneralizedComponent(name=module)
    return adapter


def _qwen2_turning(config: Any) -> "ArchitectureAdapter":
    from transformer_lens.model_bridge.generalized_components import AttentionBridge, LinearBridge
    from transformer_lens.model_bridge.supported_architectures.qwen2 import Qwen2ArchitectureAdapter

    adapter = Qwen2ArchitectureAdapter(config)
    adapter._reprefix_components("model.", "model.language_model.")
    del adapter.components["rotary_emb"]
    # TransformerLens's own attention turns positions in one dimension: right for text, wrong for a picture.
    adapter.components["blocks"].submodules["attn"] = AttentionBridge(
        name="self_attn",
        config=adapter.cfg,
        submodules={role: LinearBridge(name=f"{role}_proj") for role in "qkvo"},
        maintain_native_attention=True,
        requires_attention_mask=True,
    )
    return adapter
