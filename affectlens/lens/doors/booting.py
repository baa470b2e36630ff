"""Boot a bridge over a model that is in memory: nothing is downloaded, loaded, installed or started.

    model ──▶ which adapter? ──▶ what does it need? ──▶ its parts, put together ──▶ TransformerBridge

TransformerLens's own `boot_transformers` loads a processor by the model's name and, where torchvision is
missing, runs pip, which may replace torch. It is never called here, and its installer is disabled while a
bridge is built.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from affectlens.errors import LensError, MissingExtra

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

Adapter = Callable[[Any], "ArchitectureAdapter"]  # given TransformerLens's config of a model


def adapter_of(model: nn.Module) -> Adapter:
    """Return TransformerLens's own adapter for a model, else ours.

    Raises `LensError` where there is none, and `MissingExtra` where the adapter needs a missing package.
    """
    with quiet():
        try:
            from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
        except ImportError as error:
            raise MissingExtra(f"a bridge needs transformer-lens 4 or later: {error}") from error
    name = type(model).__name__
    if (known := SUPPORTED_ARCHITECTURES.get(name)) is not None:
        needed = list(known.required_libraries)
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if missing:
            packages = " and ".join(missing)
            raise MissingExtra(
                f"TransformerLens's adapter of {name} needs {packages}, not installed here; affectlens "
                f"installs nothing. Install {packages} for torch {torch.__version__}, or use lens.intervene"
            )
        found: Adapter = known
        return found
    if name not in ADAPTERS:
        raise LensError(
            f"neither TransformerLens nor affectlens has an adapter of {name}, so no bridge can be built; "
            f"use lens.intervene and lens.record, which need none"
        )
    return ADAPTERS[name]


def boot(model: nn.Module, adapt: Adapter, *, processor: Any = None) -> "TransformerBridge":
    """Build a bridge over a model; the model's modules are wrapped in place."""
    with quiet(), _nothing_installed(), torch.random.fork_rng(devices=[]):
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources._bridge_builder import (
            build_bridge_config_from_hf,
            detect_tokenizer_bos_eos,
        )
        from transformer_lens.model_bridge.sources.transformers_driver import TransformersDriver
        from transformer_lens.utilities.attn_implementation import force_eager_attention

        first = next(model.parameters())
        name = type(model).__name__
        config = build_bridge_config_from_hf(copy.deepcopy(model.config), name, name, first.dtype)
        adapter = adapt(config)
        adapter.cfg.device = str(first.device)
        # The bridge's `generate` counts positions in one dimension; these models count in three.
        if any(hasattr(module, "get_rope_index") for module in model.modules()):
            adapter.supports_generation = False
        force_eager_attention(model)
        adapter.prepare_model(model)
        tokenizer = getattr(processor, "tokenizer", processor)
        if tokenizer is not None:
            prepends, appends = detect_tokenizer_bos_eos(tokenizer)
            adapter.cfg.tokenizer_prepends_bos, adapter.cfg.tokenizer_appends_eos = prepends, appends
            # The bridge must tokenize a text as the lens does, without an extra BOS.
            adapter.cfg.default_prepend_bos = prepends
        built = TransformerBridge(
            model, adapter, tokenizer, driver=TransformersDriver(model, adapter, tokenizer)
        )
        built.processor = processor if processor is not tokenizer else None
        return built


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of imports and booting, and restore the log level that they change for good."""
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _nothing_installed() -> Iterator[None]:
    """Disable TransformerLens's installer of torchvision."""
    from transformer_lens.model_bridge.sources.transformers import helpers

    before = helpers._ensure_torchvision
    helpers._ensure_torchvision = lambda: False
    try:
        yield
    finally:
        helpers._ensure_torchvision = before


def smolvlm(config: Any) -> "ArchitectureAdapter":
    """Adapt SmolVLM, which has the modules of Idefics3."""
    from transformer_lens.model_bridge.supported_architectures.idefics3 import Idefics3ArchitectureAdapter

    return Idefics3ArchitectureAdapter(config)


def internvl(config: Any) -> "ArchitectureAdapter":
    """Adapt InternVL: the modules of LLaVA with its own vision tower."""
    from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter

    return _with_towers(LlavaArchitectureAdapter(config), vision_encoder="model.vision_tower")


def qwen2_vl(config: Any) -> "ArchitectureAdapter":
    """Adapt Qwen2-VL: a Qwen2 whose rotary positions have time, height and width."""
    return _with_towers(_qwen2_turning(config), vision_encoder="model.visual")


def qwen2_5_omni_thinker(config: Any) -> "ArchitectureAdapter":
    """Adapt the thinker of Qwen2.5-Omni: Qwen2-VL's language model with vision and audio towers."""
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
    # TransformerLens's own attention rotates in one dimension: right for text, wrong for images.
    adapter.components["blocks"].submodules["attn"] = AttentionBridge(
        name="self_attn",
        config=adapter.cfg,
        submodules={role: LinearBridge(name=f"{role}_proj") for role in "qkvo"},
        maintain_native_attention=True,
        requires_attention_mask=True,
    )
    return adapter
