"""Read which label a written answer names, strictly: one label, as a whole word, not negated.

text ── without the thought ── inside the answer's wrapper ── clauses ──▶ the one label that is named
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

# What begins and ends a thought; of gpt-oss, the thought's channel and the answer's.
THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
# What stands around an answer.
_WRAPPERS = (
    re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE),
    re.compile(r"<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|$)", re.DOTALL),
    re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}?\}"),
    re.compile(r"^\W*(?:final answer|answer)\W*:\s*(.*)", re.DOTALL | re.IGNORECASE | re.MULTILINE),
)
_CLAUSE = re.compile(r"[.,;:!?\n。、，；：！？]|\bbut\b|但是?|けど|しかし|하지만")
_NEGATION = re.compile(
    r"\b(?:not|cannot|no|never|neither|nor|hardly|without|nicht|kein\w*|pas|jamais|nunca|не|ليس\w*|غير)\b"
    r"|n['’]t\b|ไม่"
    r"|[没沒未]|不(?![过過仅僅但])|非(?!常)|[无無](?!比)|(?<![特分区區级級])[别別](?!人)|\b안 |\b못 "
)
# Japanese and Korean negate behind the word.
_NEGATED_AFTER = re.compile(r"\w{0,3}(?:ない|なく|なかった|ません|지 ?않|지 ?못|지 ?안| ?아니| ?아닙)")
# Scripts without spaces between words, in which a label may be found inside a run of letters: Thai, Lao,
# Tibetan, Myanmar, Khmer, kana, Han. Korean writes endings behind a word.
UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_HANGUL = "\uac00-\ud7af"
_INSIDE = re.compile(f"[{UNSPACED}]")
_ENDED = re.compile(f"[{_HANGUL}]")


def read_answer(text: str, labels: Sequence[str]) -> str | None:
    """Return the one label that an answer names, or None.

    A thought is left out, and of an answer in `<answer>…</answer>`, `\\boxed{…}` or behind "Answer:" only
    that part is read. The label must be a whole word, the only label in the answer, and not negated in its
    clause. An answer that lists several labels gives None: it would be right whatever the truth. Where a
    script has no spaces, a label may stand inside a run of letters. Case and Unicode form do not matter.

    >>> read_answer("Happy.", ["happy", "sad"]), read_answer("happy or sad", ["happy", "sad"])
    ('happy', None)
    >>> read_answer("<think>sad?</think><answer>happy</answer>", ["happy", "sad"])
    'happy'
    """
    by_word = {plain_form(label): label for label in labels}
    answer = plain_form(_answer(text))
    # The longest first, so that 'very happy' is not read as 'happy'.
    words = "|".join(map(_whole_word, sorted(filter(None, by_word), key=len, reverse=True)))
    if not words:
        return None
    named: set[str | None] = set()
    for clause in _CLAUSE.split(answer):
        for match in re.finditer(words, clause):
            negated = _NEGATION.search(clause, 0, match.start()) or _NEGATED_AFTER.match(clause, match.end())
            named.add(None if negated else by_word[match[0]])
    return named.pop() if len(named) == 1 else None


def plain_form(text: str) -> str:
    """Return a text without differences of case, of Unicode form and of spaces.

    >>> plain_form(" Fro\\u0308hlich  sein") == plain_form("FRÖHLICH SEIN")
    True
    """
    return re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def alike(labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of labels that differ only in case, spaces or Unicode form."""
    seen: dict[str, str] = {}
    for label in labels:
        first = seen.setdefault("".join(plain_form(label).split()), label)
        if first != label:
            yield first, label


def _answer(text: str) -> str:
    """Return the part of a text that answers: behind a thought, and inside a wrapper; "" in a thought."""
    for begins, ends in THOUGHTS:
        if ends in text:  # the prompt may have begun the thought
            text = text.rpartition(ends)[2]
        elif begins in text:
            return ""
    for wrapper in _WRAPPERS:
        found = wrapper.findall(text)
        if found:
            return str(found[-1])
    return text


def _whole_word(word: str) -> str:
    """Return a pattern for a word with letters of other words neither before nor behind it."""
    before = "" if _INSIDE.match(word[0]) else r"(?<!\w)"
    behind = (
        "" if _INSIDE.match(word[-1]) else rf"(?![^\W{_HANGUL}])" if _ENDED.match(word[-1]) else r"(?!\w)"
    )
    return before + re.escape(word) + behind
