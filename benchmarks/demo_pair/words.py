"""A 5,600-entry vocabulary with a fallback to single characters, and real word embeddings.

Runs of letters are words; every other character (and each symbol of a kaomoji) is a token of
its own; words outside the list are split into their letters, as in WordPiece. The embedding
of a word starts as the mean of SmolLM2's embeddings of its pieces, reduced by PCA.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<unk>", "<image>", "</s>"]
EMOTIONS = ["happy", "sad", "neutral", "scared", "playful", "sick", "loving", "angry", "sleepy"]
KINDS = ["food", "nature", "travel", "object", "activity"]
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "brown", "grey", "white", "black"]
GENRES = ["tweet", "film", "product", "news"]
TURNS = ["upright", "right", "inverted", "left"]
VALENCE, LENGTH = ["good", "bad"], ["short", "long"]
CUES = ["feel", "turn", "kind", "colour", "tone", "size", "source", "mood", "width", "copy"]
NEEDED = [*EMOTIONS, *KINDS, *COLOURS, *GENRES, *TURNS, *VALENCE, *LENGTH, *CUES]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# The parts of the message stand one after another; the cue ':' is what the answer follows.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %} {% endif %}"
    "{% if message['content'] is string %}"
    "{% if message['role'] == 'assistant' %}: {% endif %}{{ message['content'] }}"
    "{% else %}"
    "{% if message['role'] == 'assistant' %}: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if not loop.first %} {% endif %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} :{% endif %}"
)


def split(text: str) -> list[str]:
    """Split as the tokenizer does before it looks words up."""
    return re.findall(r"[a-z]+|[^a-z\s]", text.lower())


def build_vocabulary(texts: list[str], kaomoji: list[str], words: int = 5000) -> list[str]:
    """Return the entries: special, needed, letters, symbols, then words by frequency."""
    counts = Counter(w for text in texts for w in split(text))
    symbols = Counter(c for face in kaomoji for c in set(split(face)) if len(c) == 1)
    entries = [*SPECIAL, *NEEDED, *LETTERS, *("##" + c for c in LETTERS)]
    entries += [c for c, n in symbols.most_common() if n >= 5]
    entries += [w for w, n in counts.most_common() if len(w) == 1 and n >= 5]
    entries += [w for w, n in counts.most_common(words) if len(w) > 1]
    return list(dict.fromkeys(entries))


def build_tokenizer(entries: list[str]) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer with its chat template; it pads on the left."""
    table = {word: number for number, word in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(table, unk_token="<unk>", max_input_chars_per_word=24))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("[a-z]+|[^a-z]"), behavior="isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def _read_gguf(work: Path):
    """Return SmolLM2's embedding table [49152, 576] and its token strings."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    (path,) = (work / "raw/smollm2").rglob("*.gguf")
    reader = GGUFReader(str(path))
    table = next(t for t in reader.tensors if t.name == "token_embd.weight")
    field = reader.fields["tokenizer.ggml.tokens"]
    tokens = [bytes(field.parts[i]).decode("utf-8", "replace") for i in field.data]
    return dequantize(table.data, table.tensor_type), tokens


def _pieces(word, known):
    """Cut a word greedily into the longest known pieces, the first with its space mark."""
    if "Ġ" + word in known:
        return [known["Ġ" + word]]
    found, rest = [], word
    while rest:
        size = next((n for n in range(len(rest), 0, -1) if rest[:n] in known), 0)
        if not size:
            return found
        found.append(known[rest[:size]])
        rest = rest[size:]
    return found


def real_embeddings(work: Path, entries: list[str], width: int) -> torch.Tensor:
    """Return [entries, width]: PCA of SmolLM2's embeddings, zero where it has no piece."""
    table, tokens = _read_gguf(work)
    known = {token: number for number, token in enumerate(tokens)}
    rows = np.zeros((len(entries), table.shape[1]), dtype=np.float32)
    has = np.zeros(len(entries), dtype=bool)
    for number, entry in enumerate(entries):
        found = _pieces(entry.removeprefix("##"), known)
        if found and entry not in SPECIAL:
            rows[number], has[number] = table[found].mean(0), True
    mean = rows[has].mean(0)
    _, sizes, axes = np.linalg.svd(rows[has] - mean, full_matrices=False)
    # Raising the spectrum to a power below 1 keeps directions beyond word frequency audible.
    scores = (rows[has] - mean) @ axes[:width].T / (sizes[:width] / sizes[0]) ** 0.5
    result = np.zeros((len(entries), width), dtype=np.float32)
    result[has] = scores / scores.std()
    return torch.from_numpy(result)
