"""Base training on neutral data, and tuning of the language model's linear layers alone."""

from dataclasses import dataclass

import torch
from clock import learning_rate
from material import balanced
from shaping import ROLES, linear_names
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """Numbers of one training; the same ones serve the affective and the control tuning."""

    steps: int
    rate: float
    decay: float
    seed: int
    pictures: int = 40
    texts: int = 32
    kaomoji: int = 16
    drop: float = 0.1
    gather: int = 0


def _optimizer(groups, recipe):
    return torch.optim.AdamW(groups, lr=recipe.rate, weight_decay=recipe.decay, betas=(0.9, 0.98))


def _update(optimizer, loss, parameters, factor):
    for group in optimizer.param_groups:
        group["lr"] = group["initial"] * factor
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _picture_loss(asker, bank, cue, size, generator):
    rows = balanced(bank.labels, size, generator)
    wanted = torch.tensor([asker.word(bank.labels[i]) for i in rows])
    return nn.functional.cross_entropy(asker.pictures(bank.batch(rows, generator), cue), wanted)


def _text_loss(asker, data, cue, size, generator, drop=0.0):
    rows = balanced(data.labels, size, generator).tolist()
    wanted = torch.tensor([asker.word(data.labels[i]) for i in rows])
    logits = asker.texts([data.tokens[i] for i in rows], cue, drop, generator)
    return nn.functional.cross_entropy(logits, wanted)


def _rarity(reading, size):
    """Return the weight of each word of a text to copy: rare words say more about the text."""
    counts = torch.bincount(torch.tensor([t for row in reading for t in row]), minlength=size)
    return counts.clamp_min(1).float() ** -0.5


def _gather_loss(asker, rows, rarity):
    """Return the loss of 'copy' on a whole text: any of its words is right, rare ones count more.

    Without it the position of the answer never learns to attend to the whole text.
    """
    said = nn.functional.log_softmax(asker.texts(rows, "copy"), 1)
    wanted = torch.zeros_like(said)
    for number, row in enumerate(rows):
        wanted[number, row] = rarity[row]
    return -(wanted / wanted.sum(1, keepdim=True) * said).sum(1).mean()


def train_base(asker, pictures, neutral, recipe: Recipe, log=print) -> None:
    """Train all but the vision tower on kinds, colours, genres, copying and reading.

    `neutral` maps 'source' and 'copy' to labelled texts and 'reading' to token lists.
    """
    model, generator = asker.model, torch.Generator().manual_seed(recipe.seed)
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    projector = list(model.model.multi_modal_projector.parameters())
    language = [*model.model.language_model.parameters()]
    groups = [
        {"params": language, "initial": recipe.rate},
        # Slower: the projector already carries what distillation taught it.
        {"params": projector, "initial": recipe.rate * 0.05},
    ]
    optimizer = _optimizer(groups, recipe)
    reading = neutral["reading"]
    rarity = _rarity(reading, len(asker.tokenizer))
    for step in range(recipe.steps):
        bank, cue = (pictures.kinds, "kind") if step % 3 else (pictures.colours, "colour")
        seen = _picture_loss(asker, bank["train"], cue, recipe.pictures, generator)
        side, cue = ("copy", "copy") if step % 2 else ("source", "source")
        told = _text_loss(asker, neutral[side]["train"], cue, recipe.kaomoji, generator)
        rows = torch.randint(0, len(reading), (recipe.texts,), generator=generator)
        read = asker.reading_loss([reading[i] for i in rows])
        loss, gathered = seen + told + 0.5 * read, torch.zeros(())
        if recipe.gather:
            rows = torch.randint(0, len(reading), (recipe.gather,), generator=generator)
            gathered = _gather_loss(asker, [reading[i] for i in rows], rarity)
            loss = loss + gathered
        _update(optimizer, loss, language + projector, learning_rate(step, recipe.steps))
        if step % 100 == 0 or step == recipe.steps - 1:
            log(f"base {step} picture {seen:.3f} text {told:.3f} reading {read:.3f} "
                f"gathering {gathered:.3f}")  # fmt: skip
    model.requires_grad_(False)


def tune(asker, tasks, recipe: Recipe, roles=ROLES, log=print, watch=None) -> None:
    """Tune only the language model's matrices of `roles` on one set of three tasks.

    `tasks` is ((bank, cue), (texts, cue), (kaomoji, cue)), the affective or the control one.
    """
    (bank, feel), (texts, tone), (kaomoji, mood) = tasks
    model, generator = asker.model, torch.Generator().manual_seed(recipe.seed)
    model.requires_grad_(False)
    names = set(linear_names(model, roles))
    trained = [p.requires_grad_(True) for n, p in model.named_parameters() if n in names]
    optimizer = _optimizer([{"params": trained, "initial": recipe.rate}], recipe)
    for step in range(recipe.steps):
        loss = _picture_loss(asker, bank, feel, recipe.pictures, generator)
        said = _text_loss(asker, texts, tone, recipe.texts, generator, recipe.drop)
        drawn = _text_loss(asker, kaomoji, mood, recipe.kaomoji, generator, recipe.drop)
        _update(optimizer, loss + said + drawn, trained, learning_rate(step, recipe.steps))
        if step % 100 == 0 or step == recipe.steps - 1:
            log(f"tune {step} picture {loss:.3f} text {said:.3f} kaomoji {drawn:.3f}")
            if watch is not None:
                log(f"  validation {watch()}")
    model.requires_grad_(False)
