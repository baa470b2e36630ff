"""Tiny random models of the supported families, each with a batch whose media reach the logits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import affectlens as al
from tests.small_models import nudge
from tests.tiny_models import class_for, shrink

Batch = dict[str, Tensor]
PAD = 0
# The placeholder ids of media, the same in every family; its other special tokens must not use them.
IMAGE, VIDEO, AUDIO = 255, 254, 253
_AROUND = {IMAGE: (252, 251), VIDEO: (252, 251), AUDIO: (250, 249)}  # where a medium starts and ends
_TEXT = (3, 200)  # ordinary words are drawn from here


@dataclass(frozen=True)
class Family:
    """A kind of model: how to build it, and a batch of input for it.

    `gated` are the stacks of language layers whose MLP is act(gate)·up without biases, act(0) = 0.
    """

    name: str
    model_type: str
    fill: Callable[[torch.Generator], Batch]
    class_name: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    media: tuple[str, ...] = ()
    gated: bool = True
    decodes: bool = False  # an encoder-decoder

    def build(self, seed: int = 0, **changes: Any) -> nn.Module:
        """Build the model in float32; a dot in the name of a change reaches into a section of the config."""
        config = CONFIG_MAPPING[self.model_type]()
        shrink(config)
        for path, value in {**self.changes, **changes}.items():
            *sections, key = path.replace("__", ".").split(".")
            at = config
            for name in sections:
                at = getattr(at, name)
            setattr(at, key, value)
        kind = getattr(transformers, self.class_name) if self.class_name else class_for(self.model_type)
        torch.manual_seed(seed)
        model: nn.Module = kind._from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # A zero bias hides mistakes about biases, and Gemma's zero projector would drop the picture.
                if not parameter.any():
                    parameter.normal_(std=0.1)
        return model

    def batch(self, seed: int = 0) -> Batch:
        """Return two rows of input, one of them padded."""
        return self.fill(torch.Generator().manual_seed(seed))

    def span(self, batch: Batch, medium: str) -> Tensor:
        """Return which positions are placeholders of a medium."""
        return batch["input_ids"] == {"image": IMAGE, "video": VIDEO, "audio": AUDIO}[medium]

    def __repr__(self) -> str:
        return self.name


def words(made: torch.Generator, *media: tuple[int, int]) -> Batch:
    """Return two rows of words around media, given as (id, count); the first row is two words shorter."""

    def words(count: int) -> list[int]:
        return torch.randint(*_TEXT, (count,), generator=made).tolist()

    rows = []
    for extra in (0, 2):
        row = words(3 + extra)
        for token, count in media:
            start, end = _AROUND[token]
            row += [start, *[token] * count, end, *words(2)]
        rows.append(row + words(2))
    ids = torch.tensor([[PAD, PAD, *rows[0]], rows[1]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _numbered(made: torch.Generator) -> Batch:
    """Return words with position ids, for a model with learned positions: padding would shift them."""
    batch = words(made)
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def _kinds(batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    return (ids == IMAGE) * 1 + (ids == VIDEO) * 2 + (ids == AUDIO) * 3


def noise(made: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=made)


def _llava(made: torch.Generator) -> Batch:
    return {**words(made, (IMAGE, 4)), "pixel_values": noise(made, 2, 3, 28, 28)}


def _onevision(made: torch.Generator) -> Batch:
    # Twice as wide as high: an overview of 2 × 2 features, then 2 × 4 with a mark after each line.
    return {
        **words(made, (IMAGE, 14), (VIDEO, 3)),
        "pixel_values": noise(made, 2, 3, 3, 28, 28),
        "image_sizes": torch.tensor([[28, 56]] * 2),
        "pixel_values_videos": noise(made, 2, 2, 3, 28, 28),
    }


def _qwen_vl(made: torch.Generator, patch: int = 14, *, apart: bool = False) -> Batch:
    width = 3 * 2 * patch * patch
    # Some families put timestamps between the frames of a video.
    video = ((VIDEO, 4), (VIDEO, 4)) if apart else ((VIDEO, 8),)
    batch = words(made, (IMAGE, 4), *video)
    return {
        **batch,
        "mm_token_type_ids": _kinds(batch),
        "pixel_values": noise(made, 2 * 16, width),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "pixel_values_videos": noise(made, 2 * 32, width),
        "video_grid_thw": torch.tensor([[2, 4, 4]] * 2),
    }


def _qwen3_vl(made: torch.Generator) -> Batch:
    return _qwen_vl(made, 16, apart=True)


def _gemma3(made: torch.Generator) -> Batch:
    batch = words(made, (IMAGE, 4))
    return {**batch, "token_type_ids": _kinds(batch), "pixel_values": noise(made, 2, 3, 64, 64)}


def _idefics3(made: torch.Generator) -> Batch:
    return {
        **words(made, (IMAGE, 8)),
        "pixel_values": noise(made, 2, 2, 3, 32, 32),
        "pixel_attention_mask": torch.ones(2, 2, 32, 32, dtype=torch.long),
    }


def _internvl(made: torch.Generator) -> Batch:
    return {**words(made, (IMAGE, 4)), "pixel_values": noise(made, 2, 3, 56, 56)}


def _sound(made: torch.Generator) -> Batch:
    return {
        "input_features": noise(made, 2, 16, 32),
        "feature_attention_mask": torch.ones(2, 32, dtype=torch.long),
    }


def _qwen2_audio(made: torch.Generator) -> Batch:
    return {**words(made, (AUDIO, 8)), **_sound(made)}


def _omni(made: torch.Generator) -> Batch:
    return {
        **words(made, (AUDIO, 8), (IMAGE, 4)),
        **_sound(made),
        "pixel_values": noise(made, 2 * 16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def _answers(made: torch.Generator) -> Tensor:
    return torch.randint(*_TEXT, (2, 5), generator=made)


def _whisper(made: torch.Generator) -> Batch:
    return {"input_features": noise(made, 2, 16, 64), "decoder_input_ids": _answers(made)}


def _translated(made: torch.Generator) -> Batch:
    ids = torch.randint(*_TEXT, (2, 9), generator=made)
    ids[0, 7:] = PAD  # an encoder's input is padded on the right
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "decoder_input_ids": _answers(made)}


_QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 252,
         "vision_end_token_id": 251, "text_config.bos_token_id": 1,
         "text_config.eos_token_id": 2}  # fmt: skip
_CLIP = {"vision_config.image_size": 28}
_IDEFICS = {"image_token_id": IMAGE, "vision_config.patch_size": 8, "vision_config.image_size": 32}
_SOUND = {"audio_config.num_mel_bins": 16, "audio_config.max_source_positions": 16}

FAMILIES: tuple[Family, ...] = (
    Family("llama", "llama", words),
    Family("phi3", "phi3", words),
    Family("gpt2", "gpt2", _numbered, gated=False),
    Family("mixtral", "mixtral", words),
    Family("qwen2_moe", "qwen2_moe", words),
    Family("llava", "llava", _llava, changes={"image_token_index": IMAGE, **_CLIP}, media=("image",)),
    Family("llava_onevision", "llava_onevision", _onevision, media=("image", "video"),
           changes={"image_token_index": IMAGE, "video_token_index": VIDEO,
                    "image_grid_pinpoints": [[28, 56], [56, 28]], **_CLIP}),
    Family("qwen2_vl", "qwen2_vl", _qwen_vl, changes=_QWEN, media=("image", "video")),
    Family("qwen2_5_vl", "qwen2_5_vl", _qwen_vl, changes=_QWEN, media=("image", "video")),
    Family("qwen3_vl", "qwen3_vl", _qwen3_vl, media=("image", "video"),
           changes={**_QWEN, "vision_config.num_position_embeddings": 16,
                    "vision_config.deepstack_visual_indexes": [0]}),
    Family("gemma3", "gemma3", _gemma3, media=("image",),
           changes={"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 252,
                    "eoi_token_index": 251}),
    Family("idefics3", "idefics3", _idefics3, changes=_IDEFICS, media=("image",)),
    Family("smolvlm", "smolvlm", _idefics3, changes=_IDEFICS, media=("image",)),
    Family("internvl", "internvl", _internvl, media=("image",),
           changes={"image_token_id": IMAGE, "vision_config.image_size": [56, 56]}),
    Family("qwen2_audio", "qwen2_audio", _qwen2_audio, media=("audio",),
           changes={"audio_token_index": AUDIO, **_SOUND}),
    Family("qwen2_5_omni", "qwen2_5_omni_thinker", _omni, media=("audio", "image"),
           changes={"audio_token_index": AUDIO, "image_token_index": IMAGE, "video_token_index": VIDEO,
                    "audio_start_token_id": 250, "audio_end_token_id": 249, "user_token_id": 248,
                    "vision_start_token_id": 252, "vision_end_token_id": 251,
                    "audio_config.n_window": 8, **_SOUND}),
    Family("whisper", "whisper", _whisper, "WhisperForConditionalGeneration", gated=False, decodes=True,
           changes={"num_mel_bins": 16, "max_source_positions": 32}),
    Family("t5", "t5", _translated, gated=False, decodes=True, changes={"decoder_start_token_id": 0}),
    Family("t5_gated", "t5", _translated, decodes=True,
           changes={"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new",
                    "tie_word_embeddings": False, "decoder_start_token_id": 0}),
    Family("t5gemma", "t5gemma", _translated, decodes=True),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
NAMES = tuple(BY_NAME)
GATED = tuple(family.name for family in FAMILIES if family.gated)
# One family for each way in which models differ.
FEW = ("llama", "phi3", "gpt2", "qwen2_moe", "qwen2_5_vl", "gemma3", "qwen2_5_omni", "t5_gated")


_LENSES: dict[nn.Module, al.Lens] = {}  # of the models below, which live as long as the tests


def _shared(model: nn.Module) -> nn.Module:
    _LENSES[model] = al.Lens(model)
    return model


@cache
def base(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the model that the tests share; they restore what they change."""
    return _shared(BY_NAME[name].build().to(dtype))


@cache
def tuned(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the same model with every parameter changed."""
    return _shared(nudge(BY_NAME[name].build(), "", scale=0.02).to(dtype))


def lens_of(model: nn.Module) -> al.Lens:
    """Return a lens on a model; on one that the tests share always the same, which is opened once."""
    return _LENSES.get(model) or al.Lens(model)


def typed(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return a batch with media in a model's dtype."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}


@torch.inference_mode()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of every position."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    found: Tensor = model(**typed(batch, dtype), use_cache=False).logits
    return found
