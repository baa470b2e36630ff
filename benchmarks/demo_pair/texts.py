"""The rated texts and the kaomoji, with labels and splits that keep relatives together.

Texts: mean ratings of 20 people (Hutto & Gilbert 2014); valence is the sign of the mean where
its size is above 0.5. Product and news snippets are split by document; film snippets carry no
review number, so runs of twenty neighbours stay on one side. Kaomoji: five emotions of the
core tier; faces that share most of their symbols stay on one side.
"""

import gzip
import hashlib
import html
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FILES = {
    "tweet": "tweets_GroundTruth.txt",
    "film": "movieReviewSnippets_GroundTruth.txt",
    "product": "amazonReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
}
KAOMOJI = {
    "happy": "happy", "excited": "happy", "love": "loving", "sad": "sad", "angry": "angry",
    "sleepy": "sleepy",
}  # fmt: skip
SHORT_WORDS, SHORT_SYMBOLS = 12, 7


@dataclass(frozen=True)
class Text:
    """A snippet with its genre, side ('train', 'validation', 'test') and labels."""

    text: str
    genre: str
    side: str
    valence: str | None
    length: str


@dataclass(frozen=True)
class Kaomoji:
    """A text face with its emotion word (None outside the five) and its cluster."""

    key: str
    text: str
    emotion: str | None
    width: str
    cluster: int
    side: str


def _side(key: str) -> str:
    share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8
    return "test" if share < 0.12 else "validation" if share < 0.20 else "train"


def word_count_label(text: str) -> str:
    """Return 'short' for at most twelve words, else 'long'."""
    return "short" if len(text.split()) <= SHORT_WORDS else "long"


def read_texts(work: Path) -> list[Text]:
    """Read the four genres; identical texts can't fall on two sides."""
    found, seen = [], set()
    for genre, name in FILES.items():
        (path,) = (work / "raw/vader").rglob(name)
        for line in path.read_text(encoding="latin-1").splitlines():
            key, mean, text = line.split("\t", 2)
            text = html.unescape(text).strip()
            if text.lower() in seen or not text:
                continue
            seen.add(text.lower())
            group = str(int(key) // 20) if genre == "film" else key.split("_")[0]
            valence = None
            if abs(float(mean)) > 0.5:
                valence = "good" if float(mean) > 0 else "bad"
            side = _side(f"{genre}-{group}")
            found.append(Text(text, genre, side, valence, word_count_label(text)))
    return found


def _symbols(text):
    plain = unicodedata.normalize("NFKD", text)
    return "".join(c for c in plain if not c.isspace() and c not in "()*;。・･.,~")


def _clusters(texts):
    """Group texts whose sets of symbol pairs overlap by 60 % or more (Jaccard), transitively."""
    sets = []
    for text in texts:
        plain = _symbols(text)
        sets.append({plain[i : i + 2] for i in range(max(1, len(plain) - 1))})
    vocabulary = {pair: n for n, pair in enumerate(sorted(set().union(*sets)))}
    table = np.zeros((len(sets), len(vocabulary)), dtype=np.float32)
    for row, pairs in enumerate(sets):
        table[row, [vocabulary[p] for p in pairs]] = 1
    size = table.sum(1)
    shared = table @ table.T
    close = shared >= 0.6 * (size[:, None] + size[None] - shared)
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    return connected_components(csr_matrix(close), directed=False)[1].tolist()


def read_kaomoji(work: Path) -> list[Kaomoji]:
    """Read the core tier; clusters span every category, so no relative leaks through."""
    (path,) = (work / "raw/kaomoji").rglob("kaomoji.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [r for r in rows if r["tier"] == "core" and r["category"] != "uncategorized"]
    rows = [r for r in rows if len(r["text"]) <= 24]
    clusters = _clusters([r["text"] for r in rows])
    found = []
    for row, cluster in zip(rows, clusters, strict=True):
        width = "short" if len("".join(row["text"].split())) <= SHORT_SYMBOLS else "long"
        emotion = KAOMOJI.get(row["category"])
        side = _side(f"kaomoji-{cluster}")
        found.append(Kaomoji(row["id"], row["text"], emotion, width, cluster, side))
    return found
