"""From free text to a label, strictly: naming every label, or none, is not an answer."""

import re
from collections.abc import Sequence


def read_answer(text: str, labels: Sequence[str]) -> str | None:
    """Return the one label that an answer names, or None.

    The label must stand as a word of its own, be the only one, and not be negated. An answer that
    lists several labels is None: it would be right whatever the truth.

    >>> read_answer("Happy.", ["happy", "sad"]), read_answer("happy or sad", ["happy", "sad"])
    ('happy', None)
    """
    by_word = {label.lower(): label for label in labels}
    # The longest first, so that 'very happy' is not also 'happy'.
    words = "|".join(re.escape(word) for word in sorted(by_word, key=len, reverse=True))
    pattern = rf"(?P<no>\b(?:not|no|never|isn't)\s+(?:\w+\s+)?)?(?<!\w)(?P<label>{words})(?!\w)"
    found = re.finditer(pattern, text.lower())
    named = {None if match["no"] else by_word[match["label"]] for match in found}
    return named.pop() if len(named) == 1 else None
