"""Write numbers, ranges and lists as they appear in sentences, and name the norms."""

import math
from collections.abc import Iterable, Sequence

MINUS = "\N{MINUS SIGN}"  # as wide as a plus; a hyphen would also allow a line break after it
NORMS = {
    "relative": "‖Δ‖/‖W‖",
    "rms": "rms",
    "frobenius": "‖Δ‖",
    "mean_abs": "mean |Δ|",
    "max_abs": "max |Δ|",
}


def figure(value: float, digits: int = 3) -> str:
    """Write a number with three significant digits, or as many as `digits` says.

    >>> figure(0.12345), figure(-2.0), figure(0.0000123), figure(math.inf)
    ('0.123', '−2', '1.23e−05', '∞')
    """
    if value == math.inf:
        return "∞"
    return "unknown" if math.isnan(value) else f"{value:.{digits}g}".replace("-", MINUS)


def signed(value: float) -> str:
    """Write a change with its sign.

    >>> signed(0.5), signed(-0.5)
    ('+0.5', '−0.5')
    """
    return "unknown" if math.isnan(value) else f"{value:+.3g}".replace("-", MINUS)


def percent(share: float) -> str:
    """Write a share as a percentage.

    >>> percent(0.617), percent(0.00123), percent(-0.04)
    ('62\xa0%', '0.12\xa0%', '−4\xa0%')
    """
    if math.isnan(share):
        return "unknown"
    # Whole numbers suffice from 10 % on; below, two digits keep 0.4 % from becoming 0 %.
    text = f"{100 * share:.0f}" if abs(share) >= 0.1 else f"{100 * share:.2g}"
    return text.replace("-", MINUS) + "\N{NO-BREAK SPACE}%"


def between(values: Sequence[float]) -> str:
    """Write the range of some numbers.

    >>> between([1.0, 1.25]), between([2.0])
    ('1 to 1.25', '2')
    """
    low, high = figure(min(values)), figure(max(values))
    return low if low == high else f"{low} to {high}"


def listed(names: Iterable[str], last: str = "and") -> str:
    """Write names as a list.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    *most, end = list(names)
    return f"{', '.join(most)} {last} {end}" if most else end
