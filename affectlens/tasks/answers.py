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
    lowered = text.lower()
    named = set()
    for label in labels:
        pattern = rf"(?P<no>\b(?:not|no|never|isn't)\s+(?:\w+\s+)?)?(?<!\w){re.escape(label.lower())}(?!\w)"
        for match in re.finditer(pattern, lowered):
            named.add(None if match["no"] else label)
    return named.pop() if len(named) == 1 else None
