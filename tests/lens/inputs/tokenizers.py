"""Tokenizers of four kinds, made here: byte-level BPE, Unigram and BPE with a metaspace, WordPiece."""

from collections.abc import Sequence
from functools import cache

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "[CLS]", "[SEP]",
    "<|end|>", "<|user|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
)  # fmt: skip
WORDS = tuple(
    "happy sad angry good not I am so which emotion is this the movie was bad : Assistant User".split()  # noqa: SIM905
)
_CHARACTERS = [chr(code) for code in range(33, 127)]

# Kind → what the tokenizer adds around a text.
KINDS = {
    "byte-level": "$A",
    "byte-level, begins and ends": "<s> $A </s>",
    "unigram, begins": "<s> $A",
    "bpe with metaspace, begins": "<s> $A",
    "wordpiece, begins and ends": "[CLS] $A [SEP]",
}


@cache
def tokenizer_of(kind: str, *more: str) -> tokenizers.Tokenizer:
    """Build a tokenizer of a kind, with `more` special tokens."""
    special = (*SPECIAL, *more)
    made = {"byte": _byte_level, "unig": _unigram, "bpe ": _metaspace, "word": _wordpiece}[kind[:4]](special)
    made.add_special_tokens([tokenizers.AddedToken(one, special=True, normalized=False) for one in special])
    around = KINDS[kind]
    numbers = [(one, made.token_to_id(one)) for one in special if one in around.split()]
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=numbers)
    return made


def wrapped(kind: str, template: str | None = None, *more: str) -> transformers.PreTrainedTokenizerFast:
    """Wrap a tokenizer of a kind as transformers' own class, with a chat template."""
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(kind, *more),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    found.chat_template = template
    return found


def _merged(known: Sequence[str], words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocabulary, merges = {piece: number for number, piece in enumerate(dict.fromkeys(known))}, []
    for word in words:
        piece = word[0]
        for character in word[1:]:
            if piece + character not in vocabulary:
                vocabulary[piece + character] = len(vocabulary)
                merges.append((piece, character))
            piece += character
    return vocabulary, merges


def _byte_level(special: tuple[str, ...]) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = _merged([*special, *alphabet], [*(f"Ġ{word}" for word in WORDS), *WORDS])
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _unigram(special: tuple[str, ...]) -> tokenizers.Tokenizer:
    scores = dict.fromkeys(special, 0.0) | {"▁": -3.0, "\n": -5.0}
    scores |= dict.fromkeys(_CHARACTERS, -5.0) | dict.fromkeys(WORDS, -2.0)
    scores |= {f"▁{word}": -1.0 for word in WORDS}
    made = tokenizers.Tokenizer(models.Unigram(list(scores.items()), unk_id=3))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def _metaspace(special: tuple[str, ...]) -> tokenizers.Tokenizer:
    pieces = [*special, *(f"<0x{code:02X}>" for code in range(256)), "▁", *_CHARACTERS]
    vocabulary, merges = _merged(pieces, [*(f"▁{word}" for word in WORDS), *WORDS])
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _wordpiece(special: tuple[str, ...]) -> tokenizers.Tokenizer:
    pieces = [*special, *(word.lower() for word in WORDS), *_CHARACTERS, *(f"##{one}" for one in _CHARACTERS)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return made
