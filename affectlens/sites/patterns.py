"""Patterns written as one reads them: alternatives with spaces between."""

# The number of a layer or expert, in digits that Python writes; a longer one is none, and no table holds it.
INDEX = r"[0-9]{1,9}"


def words(alternatives: str) -> str:
    r"""A regular expression for any of these.

    >>> words("gate_proj w[13] \\w+_gate")
    '(?:gate_proj|w[13]|\\w+_gate)'
    """
    return f"(?:{'|'.join(alternatives.split())})"
