"""Patterns written as one reads them: alternatives with spaces between."""


def words(alternatives: str) -> str:
    r"""A regular expression for any of these.

    >>> words("gate_proj w[13] \\w+_gate")
    '(?:gate_proj|w[13]|\\w+_gate)'
    """
    return f"(?:{'|'.join(alternatives.split())})"
