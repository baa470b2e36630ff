"""Tune the same base with other seeds, and one kind of matrix at a time.

These tunings are scored and not saved; the shipped pair is the one of the first seed. Run after
`build.py` with the same `--work`: python benchmarks/demo_pair/comparing.py --out ... --work ...
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from answering import Asker
from build import TUNING, families, kept_base, prepare_labels, prepare_language, say
from clock import timed
from measuring import score_snippets, score_tasks
from shaping import ROLES, make_model, make_processor, round_weights
from training import tune

ATTENTION = ROLES[:4]
VARIANTS = {
    "gate only": (("gate_proj",), 0),
    "attention only": (ATTENTION, 0),
    "up only": (("up_proj",), 0),
    "down only": (("down_proj",), 0),
    "all, second seed": (ROLES, 1),
    "all, third seed": (ROLES, 2),
}


def compare(out: Path, work: Path, names: list[str]) -> None:
    """Tune each variant under the recipe of the shipped pair and note its scores."""
    torch.set_num_threads(1)
    path = Path(__file__).with_name("measured.json")
    measured = json.loads(path.read_text())
    steps = measured["steps"]
    texts, kaomoji, tokenizer, embeddings = prepare_language(work)
    model, processor = make_model(embeddings, 0), make_processor(tokenizer)
    asker = Asker(model, tokenizer)
    labels = prepare_labels(asker, texts, kaomoji)
    pictures = torch.load(work / f"banks-{steps['distil']}.pt", weights_only=False)
    base = torch.load(kept_base(work, steps["distil"], steps["base"]))
    for name in names:
        roles, shift = VARIANTS[name]
        model.load_state_dict(base)
        round_weights(model)
        recipe = replace(TUNING, steps=steps["tune"], seed=TUNING.seed + shift)
        clock = {}
        with timed(clock, f"compared: {name}"):
            tune(asker, families(pictures, labels)["tuned"], recipe, roles, say)
        round_weights(model)
        scores = score_tasks(model, processor, out / "tasks")
        scores |= score_snippets(model, processor, texts)
        say(f"{name} { {k: v['accuracy'] for k, v in scores.items()} }")
        # Read again: variants may run side by side.
        measured = json.loads(path.read_text())
        measured["cpu_seconds"] |= clock["cpu_seconds"]
        measured.setdefault("compared", {})[name] = scores
        path.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("../demo-pair-work"))
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    given = parser.parse_args()
    compare(given.out, given.work, given.only)
