"""Small processors for the tiny families: real ones of transformers, built without files.

Every character is a token. The video processors are the stand-ins that work without torchvision.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from affectlens.lens.inputs.processors import Frames, accepted
from tests.lens.families import AUDIO, IMAGE, VIDEO
from tests.tiny_models import VOCAB

IMAGE_START, IMAGE_END, AUDIO_START, AUDIO_END = 252, 251, 250, 249
_SPECIAL = {
    "<pad>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE, "<video>": VIDEO, "<audio>": AUDIO, "<unk>": 248,
    "<start>": IMAGE_START, "<end>": IMAGE_END, "<hear>": AUDIO_START, "<heard>": AUDIO_END,
    "<fake_token_around_image>": 247, "<end_of_utterance>": 246, "<global-img>": 245,
}  # fmt: skip
_PLACES = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
_NAMES = {
    "image_token": "<image>", "video_token": "<video>", "audio_token": "<audio>",
    "vision_bos_token": "<start>", "vision_eos_token": "<end>", "audio_bos_token": "<hear>",
    "audio_eos_token": "<heard>",
}  # fmt: skip
_BRACKETED = {"image": "<start><image><end>", "video": "<start><video><end>", "audio": "<hear><audio><heard>"}
# What a family's chat writes for a medium, where that is more than the placeholder.
_IN_CHAT = {
    "qwen2_vl": _BRACKETED, "qwen2_5_vl": _BRACKETED, "qwen2_audio": _BRACKETED, "qwen2_5_omni": _BRACKETED,
    "gemma3": {"image": "<start>"},
}  # fmt: skip


def tokenizer(**names: str) -> Any:
    """Build a tokenizer with one token per character; `names` are further special tokens by attribute."""
    vocabulary = {f"<{n}>": n for n in range(VOCAB)}
    free = (n for n in range(3, VOCAB) if n not in _SPECIAL.values())
    taken = {**_SPECIAL, **dict(zip(map(chr, [10, *range(32, 127)]), free, strict=False))}
    for text, number in taken.items():
        vocabulary.pop(f"<{number}>")
        vocabulary[text] = number
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in _SPECIAL])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={**_NAMES, **names},
    )  # fmt: skip


def chat(places: Mapping[str, str] = _PLACES) -> str:
    """Return a chat template that writes the role, and the placeholder of each medium."""
    media = "".join(f"{{% elif part.type == '{kind}' %}}{place}" for kind, place in places.items())
    part = f"{{% if part.type == 'text' %}}{{{{ part.text }}}}{media}{{% endif %}}"
    said = f"{{% for part in m.content %}}{part}{{% endfor %}}"
    content = f"{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{said}{{% endif %}}"
    asked = "{% if add_generation_prompt %}model: {% endif %}"
    return f"{{% for m in messages %}}{{{{ m.role }}}}: {content}\n{{% endfor %}}{asked}"


def _pictures(kind: str, size: int, **settings: Any) -> Any:
    return getattr(transformers, f"{kind}ImageProcessorPil")(size={"height": size, "width": size}, **settings)


def _clip(size: int) -> Any:
    return _pictures("CLIP", size, do_center_crop=False)


def _qwen_pictures() -> Any:
    return transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56})


def _sounds(seconds: int = 1) -> Any:
    # 32 frames per second, the length that a tiny encoder takes.
    return transformers.WhisperFeatureExtractor(
        feature_size=16, sampling_rate=16_000, hop_length=500, chunk_length=seconds, n_fft=400
    )


def _llava() -> Any:
    return transformers.LlavaProcessor(
        _clip(28), tokenizer(), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def _onevision() -> Any:
    pictures = _pictures("LlavaOnevision", 28, image_grid_pinpoints=[[28, 56], [56, 28]])
    films = Frames("LlavaOnevisionProcessor", {"size": {"height": 28, "width": 28}})
    return transformers.LlavaOnevisionProcessor(
        pictures, tokenizer(), films, num_image_tokens=4, vision_feature_select_strategy="full"
    )


def _qwen(name: str) -> Any:
    films = Frames(name, {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}})
    return getattr(transformers, name)(_qwen_pictures(), tokenizer(), films)


def _gemma3() -> Any:
    names = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    return transformers.Gemma3Processor(_pictures("Gemma3", 64), tokenizer(**names), image_seq_length=4)


def _idefics3() -> Any:
    pictures = transformers.Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": 32}, max_image_size={"longest_edge": 32}
    )
    return transformers.Idefics3Processor(pictures, tokenizer(), image_seq_len=4)


def _internvl() -> Any:
    names = {"start_image_token": "<start>", "end_image_token": "<end>", "context_image_token": "<image>"}
    films = Frames("InternVLProcessor", {"size": {"height": 56, "width": 56}})
    return transformers.InternVLProcessor(
        _pictures("GotOcr2", 56), tokenizer(**names), films, image_seq_length=4
    )


def _audio() -> Any:
    return transformers.Qwen2AudioProcessor(_sounds(), tokenizer(), chat_template="")


def _omni() -> Any:
    films = Frames("Qwen2_5OmniProcessor", {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}})
    made = transformers.Qwen2_5OmniProcessor(_qwen_pictures(), films, _sounds(), tokenizer())
    made.videos_kwargs = {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}}
    return made


def _whisper() -> Any:
    return transformers.WhisperProcessor(_sounds(2), tokenizer())


_MADE: Mapping[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava_onevision": _onevision,
    "qwen2_vl": lambda: _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VLProcessor"),
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "internvl": _internvl,
    "qwen2_audio": _audio,
    "qwen2_5_omni": _omni,
    "whisper": _whisper,
}


@cache
def processor(family: str, *, template: bool = True) -> Any:
    """Return the processor of a family, with or without a chat template; a tokenizer for text-only ones."""
    with accepted():
        made = _MADE.get(family, tokenizer)()
    made.chat_template = chat(_IN_CHAT.get(family, _PLACES)) if template else None
    return made
