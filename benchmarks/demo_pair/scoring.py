"""Held-out scores with their sample size, majority share and 95 % interval."""

import math
from collections import Counter

import torch


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    z, p = 1.959964, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return round(middle - half, 4), round(middle + half, 4)


def summary(said: list[str], labels: list[str], groups: list | None = None) -> dict:
    """Return accuracy, n, the majority share, chance, interval and mean recall per class."""
    right = [a == b for a, b in zip(said, labels, strict=True)]
    counts = Counter(labels)
    recalls = [
        sum(r for r, b in zip(right, labels, strict=True) if b == name) / count
        for name, count in counts.items()
    ]
    result = {
        "accuracy": round(sum(right) / len(right), 4),
        "interval": wilson(sum(right), len(right)),
        "n": len(right),
        "majority": round(max(counts.values()) / len(right), 4),
        "mean_recall": round(sum(recalls) / len(recalls), 4),
    }
    if groups is not None:
        result["clusters"] = len(set(groups))
    return result


def _choose(asker, logits, names):
    ids = torch.tensor([asker.word(name) for name in names])
    return [names[i] for i in logits[:, ids].argmax(1).tolist()]


@torch.inference_mode()
def score_bank(asker, bank, cue, names) -> dict:
    """Score the first copy of every picture of a bank."""
    parts = [asker.pictures(f.float(), cue) for f in bank.features[:, 0].split(128)]
    return summary(_choose(asker, torch.cat(parts), names), bank.labels)


@torch.inference_mode()
def score_texts(asker, data, cue, names) -> dict:
    """Score labelled token lists."""
    parts = [asker.texts(data.tokens[start : start + 64], cue) for start in range(0, len(data), 64)]
    return summary(_choose(asker, torch.cat(parts), names), data.labels)
