"""From free text to a label, strictly: naming every label, or none, is not an answer."""

import re
from collections.abc import Sequence

_CLAUSE = re.compile(r"[.,;:!?\n]|\bbut\b")
_NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|hardly|without)\b|n['’]t\b")


def read_answer(text: str, labels: Sequence[str]) -> str | None:
    """Return the one label that an answer names, or None.

    The label must stand as a word of its own, be the only one, and not be negated earlier in its
    clause. An answer that lists several labels is None: it would be right whatever the truth.

    >>> read_answer("Happy.", ["happy", "sad"]), read_answer("happy or sad", ["happy", "sad"])
    ('happy', None)
    """
    by_word = {label.lower(): label for label in labels}
    # The longest first, so that 'very happy' is not also 'happy'.
    words = "|".join(re.escape(word) for word in sorted(by_word, key=len, reverse=True))
    named: set[str | None] = set()
    for clause in _CLAUSE.split(text.lower()):
        for match in re.finditer(rf"(?<!\w)(?:{words})(?!\w)", clause):
            negated = _NEGATION.search(clause, 0, match.start())
            named.add(None if negated else by_word[match[0]])
    return named.pop() if len(named) == 1 else None
