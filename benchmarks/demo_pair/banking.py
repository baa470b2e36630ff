"""Feature banks: what the frozen tower sees in many augmented copies of each picture.

Once the tower is frozen, a few dozen augmentations a picture, computed once, are nearly as
good as fresh ones at each step and cost a fraction.
"""

from dataclasses import dataclass

import numpy as np
import torch
from augmenting import as_rgba, augment, shrink
from words import COLOURS

PALETTE = {
    "red": (215, 40, 45), "orange": (245, 140, 40), "yellow": (252, 205, 60),
    "green": (90, 165, 70), "blue": (60, 140, 220), "purple": (130, 80, 180),
    "brown": (125, 80, 55), "grey": (145, 150, 155), "white": (240, 240, 240),
    "black": (40, 40, 42),
}  # fmt: skip


@dataclass(frozen=True)
class Bank:
    """Tower outputs [pictures, copies, 16, width] in half precision, with one label each."""

    features: torch.Tensor
    labels: list[str]

    def batch(self, rows, generator):
        copies = torch.randint(0, self.features.shape[1], (len(rows),), generator=generator)
        return self.features[rows, copies].float()


@torch.inference_mode()
def look(model, pictures) -> torch.Tensor:
    """Return the tower's patch outputs of RGB pictures in 0..1."""
    parts = [model.model.vision_tower(part * 2 - 1).last_hidden_state[:, 1:] for part in pictures.split(128)]
    return torch.cat(parts)


def make_bank(model, pixels, labels, turns, copies, generator, strength=1.0) -> Bank:
    """Augment each RGBA picture `copies` times and keep the tower's outputs."""
    turns = torch.as_tensor(turns, dtype=torch.float32)
    layers = []
    for _ in range(copies):
        parts = []
        for start in range(0, len(pixels), 128):
            rgba = as_rgba(np.stack(pixels[start : start + 128]))
            big = augment(rgba, turns[start : start + 128], generator, strength)
            parts.append(look(model, shrink(big)).half())
        layers.append(torch.cat(parts))
    return Bank(torch.stack(layers, 1), labels)


def dominant_colour(rgba: np.ndarray) -> str:
    """Name the palette colour most opaque pixels are nearest to."""
    pixels = rgba[rgba[..., 3] > 200][:, :3].astype(np.float32)
    palette = np.array([PALETTE[name] for name in COLOURS], dtype=np.float32)
    nearest = ((pixels[:, None] - palette) ** 2).sum(-1).argmin(1)
    return COLOURS[int(np.bincount(nearest, minlength=len(COLOURS)).argmax())]
