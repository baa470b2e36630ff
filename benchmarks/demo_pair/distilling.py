"""Teach the small vision tower what DINOv2 sees, on every emoji of the training styles.

Two losses share each step. Imitation: the tower's 16 patch outputs, and the 16 projected
tokens the language model will read, each predict the teacher's features of the same picture
(after a softened whitening, so that the outline of the head does not outweigh the mouth).
Identity: the projected tokens tell which of 1,171 emoji a freshly augmented picture shows,
in any drawing style. Neither uses an emotion label.
"""

from pathlib import Path

import numpy as np
import torch
from augmenting import as_rgba, augment, recolour, shrink
from clock import learning_rate
from drawing import TRAIN_STYLES, draw_all, emoji_list
from teacher import Teacher
from torch import nn

CHANNELS = 160  # teacher directions kept by the PCA
CHUNK = 64


def _plan(work, drawn, generator):
    """List (style, code, strength, quarter turns): faces three times, the rest once."""
    plan = []
    for style in TRAIN_STYLES:
        for emoji in emoji_list(work):
            if emoji.code not in drawn[style]:
                continue
            turn = int(torch.randint(0, 4, (1,), generator=generator))
            if emoji.category == "Smileys & Emotion":
                wanted = [(0.3, 0), (1.0, 0), (1.0, turn)]
            else:
                wanted = [(0.8, turn if turn == 1 else 0)]
            plan += [(style, emoji.code, strength, turns) for strength, turns in wanted]
    order = torch.randperm(len(plan), generator=generator).tolist()
    return [plan[i] for i in order]


def teach(work: Path, seed: int) -> None:
    """Store pairs of 64 px pictures and teacher features in `teacher.npz`."""
    generator = torch.Generator().manual_seed(seed)
    drawn, teacher = draw_all(work), Teacher(work)
    plan = _plan(work, drawn, generator)
    pictures, features = [], []
    for start in range(0, len(plan), CHUNK):
        part = plan[start : start + CHUNK]
        big = []
        for strength in (0.3, 0.8, 1.0):
            rows = [row for row in part if row[2] == strength]
            if rows:
                rgba = as_rgba(np.stack([drawn[s][code] for s, code, _, _ in rows]))
                turns = torch.tensor([float(row[3]) for row in rows])
                big.append(augment(rgba, turns, generator, strength))
        big = torch.cat(big)
        features.append(teacher(big).half().numpy())
        pictures.append((shrink(big) * 255).round().byte().numpy())
    np.savez(work / "teacher.npz", x=np.concatenate(pictures), y=np.concatenate(features))


def whitened(features):
    """Return PCA scores [n, 16, CHANNELS], the spread of each direction reduced to its root."""
    flat = torch.as_tensor(features, dtype=torch.float32).flatten(0, 1)
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    top = vectors[:, -CHANNELS:] / values[-CHANNELS:].clamp_min(1e-6) ** 0.3
    scores = flat @ top
    scores = scores / scores.std()
    return scores.view(len(features), -1, CHANNELS)


class FreshEmoji:
    """All training pictures with the number of the emoji, for new augmentations each step."""

    def __init__(self, work):
        drawn = draw_all(work)
        codes = [e.code for e in emoji_list(work)]
        rows = [(s, n, c) for s in TRAIN_STYLES for n, c in enumerate(codes) if c in drawn[s]]
        self.pixels = torch.as_tensor(np.stack([drawn[s][c] for s, _, c in rows]))
        self.number = torch.tensor([n for _, n, _ in rows])
        faces = {e.code for e in emoji_list(work) if e.category == "Smileys & Emotion"}
        weight = torch.tensor([3.0 if c in faces else 1.0 for _, _, c in rows])
        self.weight, self.count = weight, len(codes)

    def batch(self, size, generator):
        rows = torch.multinomial(self.weight, size, replacement=True, generator=generator)
        turned = torch.rand(size, generator=generator) < 0.2
        turns = turned * torch.randint(0, 4, (size,), generator=generator)
        pictures = augment(as_rgba(self.pixels[rows]), turns.float(), generator)
        return shrink(pictures), self.number[rows]


def see(model, pictures):
    """Return patch outputs and projected tokens of pictures in 0..1."""
    hidden = model.model.vision_tower(pictures * 2 - 1).last_hidden_state[:, 1:]
    return hidden, model.model.multi_modal_projector(hidden)


def distil(model, work: Path, seed: int, steps: int, log=print) -> None:
    """Train the vision tower and the projector of `model` in place."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    with np.load(work / "teacher.npz") as file:
        pictures, targets = torch.as_tensor(file["x"]), whitened(file["y"])
    fresh = FreshEmoji(work)
    width = model.config.vision_config.hidden_size
    out = model.config.text_config.hidden_size
    heads = nn.ModuleList(
        [nn.Linear(width, CHANNELS), nn.Linear(out, CHANNELS), nn.Linear(16 * out, fresh.count)]
    )
    trained = [*model.model.vision_tower.parameters(), *heads.parameters()]
    trained += model.model.multi_modal_projector.parameters()
    optimizer = torch.optim.AdamW(trained, lr=1.5e-3, weight_decay=0.02, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * learning_rate(step, steps, warm=80)
        rows = torch.randint(0, len(pictures), (48,), generator=generator)
        old = recolour(pictures[rows].float() / 255, generator, 0.4)
        new, number = fresh.batch(48, generator)
        with torch.autocast("cpu", torch.bfloat16):
            hidden, tokens = see(model, torch.cat([old, new]))
        hidden, tokens = hidden.float(), tokens.float()
        target = targets[rows]
        imitation = nn.functional.mse_loss(heads[0](hidden[:48]), target)
        imitation = imitation + nn.functional.mse_loss(heads[1](tokens[:48]), target)
        flat = nn.functional.normalize(tokens[48:].flatten(1), dim=1) * 16
        identity = nn.functional.cross_entropy(
            heads[2](nn.functional.dropout(flat, 0.1)), number, label_smoothing=0.1
        )
        loss = imitation + 0.15 * identity
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            log(f"distil {step} imitation {imitation:.3f} identity {identity:.3f}")
