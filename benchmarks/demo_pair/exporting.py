"""Write the evaluation sets that travel with the package: JSON lines and sprite sheets."""

import json
import random
from pathlib import Path

from drawing import TEST_STYLE, draw_all, emoji_list, on_white, save_sheet
from texts import word_count_label
from words import EMOTIONS, KINDS, LENGTH, TURNS, VALENCE

FIT_STYLES = ("noto", "fluent3d")
KINDS_EACH, KAOMOJI_MOST = 40, 200
FIVE = [w for w in EMOTIONS if w in ("happy", "loving", "sad", "angry", "sleepy")]


def _write(folder, name, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _picture_rows(drawn, chosen, sheet):
    """Return rows for (style, emoji, label, quarter turns), and write their sheet."""
    pictures = [on_white(drawn[style][e.code], turns) for style, e, _, turns in chosen]
    places = save_sheet(pictures, sheet)
    return [
        {
            "id": f"{style}-{e.code.lower()}" + (f"-{label}" if label in TURNS else ""),
            "image": place,
            "label": label,
            "meta": {"style": style, "face": e.code, "name": e.name, "cluster": e.code},
        }
        for (style, e, label, _), place in zip(chosen, places, strict=True)
    ]


def _export_pictures(work, folder):
    drawn, emoji = draw_all(work), emoji_list(work)
    faces = [e for e in emoji if e.emotion]
    unseen = [(TEST_STYLE, e, e.emotion, 0) for e in faces]
    _write(folder, "faces-unseen", _picture_rows(drawn, unseen, folder / "twemoji-faces.webp"))
    fit = []
    for style in FIT_STYLES:
        chosen = [(style, e, e.emotion, 0) for e in faces if e.code in drawn[style]]
        fit += _picture_rows(drawn, chosen, folder / f"{style}-faces.webp")
    _write(folder, "faces-fit", fit)
    turned = [(TEST_STYLE, e, name, t) for e in faces for t, name in enumerate(TURNS)]
    sheet = folder / "twemoji-turned.webp"
    _write(folder, "turned-unseen", _picture_rows(drawn, turned, sheet))
    draw = random.Random(5)
    things = []
    for kind in KINDS:
        ofkind = [e for e in emoji if e.kind == kind]
        things += [(TEST_STYLE, e, kind, 0) for e in draw.sample(ofkind, KINDS_EACH)]
    _write(folder, "kinds-unseen", _picture_rows(drawn, things, folder / "twemoji-things.webp"))


def _export_texts(folder, kaomoji):
    held = [k for k in kaomoji if k.side == "test" and k.emotion]
    held = random.Random(5).sample(held, min(KAOMOJI_MOST, len(held)))
    rows = [(k.key, k.text, k.emotion, k.width, {"cluster": k.cluster}) for k in held]
    for name, at in (("kaomoji", 2), ("kaomoji-width", 3)):
        _write(folder, name, [
            {"id": row[0], "text": row[1], "label": row[at], "meta": row[4]} for row in rows
        ])  # fmt: skip
    lines = Path(__file__).with_name("sentences.tsv").read_text().splitlines()
    pairs = [line.split("\t") for line in lines]
    half = len(pairs) // 2  # many sentences have their mirror image in the other half
    for name, label in (("sentences", None), ("length", word_count_label)):
        _write(folder, name, [
            {"id": f"sentence-{n:03}", "text": text,
             "label": valence if label is None else label(text), "meta": {"cluster": n % half}}
            for n, (valence, text) in enumerate(pairs)
        ])  # fmt: skip


TASKS = {
    "faces-unseen": ("affective", "feel", EMOTIONS, "emotion of 108 faces, style never trained on"),
    "faces-fit": ("affective", "feel", EMOTIONS, "the same faces in two training styles: fit, not skill"),
    "kaomoji": ("affective", "{text} mood", FIVE, "emotion of held-out kaomoji, relatives kept apart"),
    "sentences": ("affective", "{text} tone", VALENCE, "valence of 120 sentences of this project"),
    "turned-unseen": ("control", "turn", TURNS, "which way a Twemoji face is turned"),
    "length": ("control", "{text} size", LENGTH, "at most twelve words or more, the same sentences"),
    "kaomoji-width": ("control", "{text} width", LENGTH, "at most seven signs or more"),
    "kinds-unseen": ("neutral", "kind", KINDS, "kind of object in Twemoji drawings, learned in base only"),
}  # fmt: skip


def export_tasks(work: Path, folder: Path, kaomoji) -> None:
    """Write all sets and `tasks.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    _export_pictures(work, folder)
    _export_texts(folder, kaomoji)
    table = {
        name: {
            "file": f"{name}.jsonl", "kind": kind, "prompt": prompt, "labels": list(labels),
            "about": about, "fit": name.endswith("-fit"),
        }
        for name, (kind, prompt, labels, about) in TASKS.items()
    }  # fmt: skip
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    (folder / "tasks.json").write_text(text, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)
