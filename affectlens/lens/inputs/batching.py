"""Split examples into batches in which each gives what it gives alone.

Examples are padded to one length where the model masks padding out, and else grouped by length.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from torch import Tensor

from affectlens.lens.inputs.padding import is_padded, reads_padding
from affectlens.lens.live import Live
from affectlens.tasks import Example

Made = TypeVar("Made")
Numbers = tuple[int, ...]  # of examples


def batches(
    live: Live,
    examples: Sequence[Example],
    *,
    make: Callable[..., Made],
    tensors: Callable[[Made], Mapping[str, Tensor]],
    size: int,
    in_order: bool = False,
) -> Iterator[tuple[Numbers, Made]]:
    """Yield batches of at most `size` examples, each with the numbers of its examples.

    `make(*examples)` prepares a batch, whose `tensors` are the model's input. The numbers come in any order,
    unless `in_order`: then only neighbours of one length share a batch.
    """

    def made(numbers: Sequence[int]) -> Made:
        return make(*(examples[number] for number in numbers))

    for start in range(0, len(examples), size):
        some = tuple(range(start, min(start + size, len(examples))))
        found = made(some)
        if is_padded(tensors(found)) and _reads_padding(
            live, some, tensors(found), lambda n: tensors(made(n))
        ):
            break
        yield some, found
    else:
        return
    rest = range(start, len(examples))
    # Of all tensors: pictures and sounds of other sizes are padded too.
    shapes = {n: tuple((name, t.shape) for name, t in tensors(made([n])).items()) for n in rest}
    for group in _alike(shapes, in_order=in_order):
        for first in range(0, len(group), size):
            yield group[first : first + size], made(group[first : first + size])


def _reads_padding(
    live: Live,
    some: Numbers,
    batch: Mapping[str, Tensor],
    made: Callable[[Sequence[int]], Mapping[str, Tensor]],
) -> bool:
    """Return whether the model reads padding, measured on the shortest and the longest row of a batch."""
    if live.reads_padding is not None or "attention_mask" not in batch:
        return live.reads_padding is not False
    lengths = batch["attention_mask"].sum(1)
    short, long = some[int(lengths.argmin())], some[int(lengths.argmax())]
    return reads_padding(live, alone=made([short]), padded=made([short, long]))


def _alike(keys: Mapping[int, Hashable], *, in_order: bool) -> list[Numbers]:
    """Group numbers with equal keys: all of them, or only neighbours."""
    if in_order:
        return [tuple(group) for _, group in groupby(keys, keys.__getitem__)]
    found: dict[Hashable, list[int]] = {}
    for number, key in keys.items():
        found.setdefault(key, []).append(number)
    return [tuple(group) for group in found.values()]
