"""Everything a training step draws from, prepared once per build."""

from dataclasses import dataclass

import numpy as np
import torch
from banking import Bank, dominant_colour, make_bank
from drawing import TEST_STYLE, TRAIN_STYLES, VALIDATION_STYLE, draw_all, emoji_list
from words import TURNS


@dataclass(frozen=True)
class Labelled:
    """Token lists with one answer word each."""

    tokens: list[list[int]]
    labels: list[str]

    def __len__(self):
        return len(self.labels)


@dataclass(frozen=True)
class Pictures:
    """Banks by name: 'train', 'validation' and, opened only at the end, 'test'."""

    kinds: dict[str, Bank]
    colours: dict[str, Bank]
    faces: dict[str, Bank]
    turned: dict[str, Bank]


def _styles(side):
    return {"train": TRAIN_STYLES, "validation": (VALIDATION_STYLE,), "test": (TEST_STYLE,)}[side]


def prepare_pictures(model, work, seed: int, small: bool = False) -> Pictures:
    """Run the frozen tower over augmented training pictures and plain validation ones."""
    generator = torch.Generator().manual_seed(seed)
    drawn, emoji = draw_all(work), emoji_list(work)
    banks = {"kinds": {}, "colours": {}, "faces": {}, "turned": {}}
    for side in ("train", "validation"):
        train = side == "train"
        strength = 1.0 if train else 0.0
        things, faces = (
            [(drawn[s][e.code], e) for s in _styles(side) for e in emoji if test(e)
             and e.code in drawn[s]]
            for test in (lambda e: e.kind, lambda e: e.emotion)
        )  # fmt: skip
        pixels = [p for p, _ in things]
        copies = {"things": 5, "faces": 24, "turned": 6} if train else dict.fromkeys(
            ("things", "faces", "turned"), 1)  # fmt: skip
        if small and train:
            copies = {"things": 1, "faces": 4, "turned": 1}
        bank = make_bank(
            model, pixels, [e.kind for _, e in things], [0] * len(pixels), copies["things"],
            generator, 0.7 * strength,
        )  # fmt: skip
        banks["kinds"][side] = bank
        banks["colours"][side] = Bank(bank.features, [dominant_colour(p) for p in pixels])
        pixels = [p for p, _ in faces]
        banks["faces"][side] = make_bank(
            model, pixels, [e.emotion for _, e in faces], [0] * len(pixels), copies["faces"],
            generator, strength,
        )  # fmt: skip
        turns = [t for t in range(4) for _ in pixels]
        banks["turned"][side] = make_bank(
            model, pixels * 4, [TURNS[t] for t in turns], turns, copies["turned"],
            generator, strength,
        )  # fmt: skip
    return Pictures(**banks)


def label_texts(asker, rows, label) -> dict[str, Labelled]:
    """Return side -> labelled token lists of the rows that `label` gives a word for."""
    sides = {}
    for side in ("train", "validation", "test"):
        kept = [r for r in rows if r.side == side and label(r) is not None]
        sides[side] = Labelled(asker.tokens([r.text for r in kept]), [label(r) for r in kept])
    return sides


def balanced(labels: list[str], size: int, generator, share: float = 0.5) -> torch.Tensor:
    """Draw rows: `share` of them with every label equally likely, the rest as they come."""
    names, codes = np.unique(labels, return_inverse=True)
    counts = np.bincount(codes, minlength=len(names))
    weight = share / (len(names) * counts[codes]) + (1 - share) / len(labels)
    weight = torch.as_tensor(weight, dtype=torch.float32)
    return torch.multinomial(weight, size, replacement=True, generator=generator)
