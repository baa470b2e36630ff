"""Settings by module: patterns of names, each with a value, as `rank_pattern` and `alpha_pattern` have them.

An adapter comes from a stranger, and a regular expression can take longer than anyone lives. So all of them
together get a few seconds.
"""

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import regex

from affectlens.errors import CheckpointError, quoted

_LONGEST = 1000  # characters; the names of modules, of which PEFT makes patterns, have 200
_SECONDS = 2.0  # 500 patterns for as many names take one


def matched(
    patterns: Mapping[str, float], modules: Iterable[str], *, source: str, what: str
) -> dict[str, float]:
    """The value of the first pattern that fits each module, the whole name or its end, as PEFT matches.

    `what` is the setting that they are. Raises `CheckpointError` where they take too long.
    """
    left, until = dict.fromkeys(modules), time.monotonic() + _SECONDS
    found = {}
    for pattern, value in patterns.items():
        compiled = _compiled(pattern, source, what)
        for module in list(left):
            try:
                if compiled.match(module, timeout=max(until - time.monotonic(), 0.001)):
                    found[module] = value
                    del left[module]
            except TimeoutError:
                reason = f"{what} {quoted(pattern)} takes too long to match"
                raise CheckpointError(source, reason, fix="Write out the names of the modules") from None
    return found


def _compiled(pattern: str, source: str, what: str) -> Any:
    try:
        if len(pattern) > _LONGEST:
            raise ValueError
        re.compile(pattern)  # what this does not know, such as recursion, PEFT does not either
        return regex.compile(rf"(.*\.)?({pattern})$")
    except (re.error, regex.error, ValueError, OverflowError, RecursionError):
        raise CheckpointError(source, f"{what} {quoted(pattern)} is not a pattern of names") from None
