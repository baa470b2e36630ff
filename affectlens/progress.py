"""Show how far a long run is: a bar in a terminal, a widget in a notebook, and lines where nobody watches.

with shown(226, unit="model", what="sweep") as step:
    step(1)                       ──▶ sweep: 41 of 226 models, 18 %, 21 min left
"""

import html
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Step = Callable[[int], None]  # told how many more are done
SECONDS = 2.0  # shorter runs show nothing
EVERY = 30.0  # seconds between two lines of a log


@contextmanager
def shown(total: int, *, unit: str, what: str, initial: int = 0, show: bool = True) -> Iterator[Step]:
    """Show the progress of a block that tells how many of `total` units are done; unit "B" means bytes."""
    count = _Count(total, unit, what, initial)
    if not show or total <= initial:
        yield count.add
    elif (display := _notebook()) is not None:
        yield from _widget(count, display)
    elif sys.stderr is not None and sys.stderr.isatty():
        yield from _bar(count)
    else:
        yield from _lines(count)


def each(things: Iterable[T], *, total: int, unit: str, what: str, show: bool = True) -> Iterator[T]:
    """Iterate over things and show how many are done."""
    with shown(total, unit=unit, what=what, show=show) as step:
        for thing in things:
            yield thing
            step(1)


def say(words: str, *, show: bool = True) -> None:
    """Print a line about a run that begins; notebooks get none, as it would stay in their output."""
    if show and _notebook() is None:
        print(words, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a duration in words, in one or two units.

    >>> duration(3.2), duration(100), duration(4000)
    ('3 s', '1 min 40 s', '1 h 6 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 60} min" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


@dataclass
class _Count:
    """What is done of a total, and since when."""

    total: int
    unit: str
    what: str
    initial: int
    done: int = field(init=False)
    start: float = field(default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        self.done = self.initial

    def add(self, number: int) -> None:
        self.done = min(self.done + number, self.total)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __str__(self) -> str:
        new = self.done - self.initial
        left = f", {duration(self.seconds / new * (self.total - self.done))} left" if new else ""
        return f"{self.what}: {self._amount()}, {100 * self.done // self.total} %{left}"

    def _amount(self) -> str:
        if self.unit == "B":
            return f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB"
        return f"{self.done:,} of {self.total:,} {self.unit}{'s' if self.total != 1 else ''}"


def _bar(count: _Count) -> Iterator[Step]:
    from tqdm import tqdm

    scale = count.unit == "B"
    about: dict[str, Any] = {"desc": count.what, "unit": count.unit if scale else f" {count.unit}"}
    with tqdm(
        total=count.total, initial=count.initial, unit_scale=scale, leave=False, delay=SECONDS, **about
    ) as bar:

        def step(number: int) -> None:
            bar.update(number)

        yield step


def _lines(count: _Count) -> Iterator[Step]:
    last = 0.0

    def step(number: int) -> None:
        nonlocal last
        count.add(number)
        if count.seconds - last >= EVERY and count.done < count.total:
            last = count.seconds
            print(count, file=sys.stderr, flush=True)

    yield step
    if last:
        print(f"{count.what}: done in {duration(count.seconds)}", file=sys.stderr, flush=True)


def _widget(count: _Count, display: Callable[..., Any]) -> Iterator[Step]:
    handle: Any = None
    last = 0.0

    def step(number: int) -> None:
        nonlocal handle, last
        count.add(number)
        if count.seconds - last < (0.5 if handle else SECONDS):
            return
        last = count.seconds
        bar = f'<progress max="{count.total}" value="{count.done}"></progress> {html.escape(str(count))}'
        found = {"text/html": bar, "text/plain": str(count)}
        handle = handle or display({}, raw=True, display_id=True)
        handle.update(found, raw=True)

    try:
        yield step
    finally:
        if handle is not None:
            handle.update({"text/plain": ""}, raw=True)


def _notebook() -> Callable[..., Any] | None:
    """Return IPython's `display` in a notebook; None elsewhere."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    found = get_ipython()
    return display if found is not None and "IPKernelApp" in found.config else None
