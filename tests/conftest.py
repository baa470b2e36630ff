"""Tiny models with random weights, saved and live, and the embedded pair; nothing is downloaded."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from torch import nn

import affectlens as al
from tests.hostile.running import Server

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "in_channels": 3, "patch_size": 14}


def tiny(model_type: str, *, seed: int = 0, **other: int) -> nn.Module:
    """Build a tiny random model of a type that transformers knows."""
    torch.manual_seed(seed)
    text, vision = {**TEXT, **other}, dict(VISION)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    settings: dict[str, object] = {
        "llava": {
            "text_config": {"model_type": "llama", **text},
            "image_token_id": 63,
            "image_token_index": 63,
        },
        "gemma3": {"text_config": text},
        "qwen2_vl": {
            "text_config": {**text, "rope_parameters": rope},
            "vision_config": {**QWEN_VISION, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2},
        },
        "qwen2_5_vl": {
            "text_config": {**text, "rope_parameters": rope},
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 24,
                "intermediate_size": 40,
                "out_hidden_size": 32,
            },
        },
        "qwen3_vl": {
            "text_config": {**text, "rope_parameters": rope},
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 24,
                "intermediate_size": 40,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
    }.get(model_type, text)
    if model_type == "llava":
        settings["vision_config"] = {"model_type": "clip_vision_model", **vision}
    if model_type == "gemma3":
        settings["vision_config"] = {"model_type": "siglip_vision_model", **vision}
        settings["mm_tokens_per_image"] = 4
    config = transformers.AutoConfig.for_model(model_type, **settings)
    kinds = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
    kind = kinds[0] if type(config) in kinds[0]._model_mapping else kinds[1]
    return kind.from_config(config).eval()


def nudge(model: nn.Module, fragment: str, *, scale: float = 0.01, seed: int = 1) -> nn.Module:
    """Move every parameter whose name holds `fragment` by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if fragment in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests: side by side with others, one of them at the end would run alone."""
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("tutorials", "docs"))))


def pytest_collection_finish() -> None:
    """Keep the garbage collector off modules and tests: they live until the end, and some tests call it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Undo what the command line, run in this process, does about Ctrl-C: it would end all the tests."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
    signal.set_wakeup_fd(-1)


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a model into a new folder; `shards=True` spreads it over several files."""

    def saved(model: nn.Module, name: str, *, shards: bool = False) -> Path:
        folder = tmp_path_factory.mktemp(name) / name
        model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
        return folder

    return saved


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A warm process for the command line: torch takes seconds to import, and most runs a tenth of one."""
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="session")
def pair(save: Callable[..., Path]) -> tuple[Path, Path]:
    """A tiny LLaVA and the same after a nudge to its language layers' MLPs."""
    model = tiny("llava")
    base = save(model, "base")
    return base, save(nudge(model, "language_model.layers"), "tuned", shards=True)


@pytest.fixture(scope="session")
def demo() -> al.Demo:
    """The embedded pair."""
    return al.load_demo()


@pytest.fixture(scope="session")
def lens(demo: al.Demo) -> al.Lens:
    """The embedded base, live, in float32."""
    return al.load(demo.base, dtype="float32")
