"""Score the saved checkpoints the way a user would: processor, chat template, next token."""

import json
from pathlib import Path

import torch
from PIL import Image
from scoring import summary
from texts import Text
from words import VALENCE

NAMES = ("base", "tuned", "control")


def load(folder: Path):
    """Load one checkpoint through the public classes, in float32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def _crop(folder, reference, sheets):
    name, _, box = reference.partition("#xywh=")
    if name not in sheets:
        sheets[name] = Image.open(folder / name).convert("RGB")
    x, y, width, height = map(int, box.split(","))
    return sheets[name].crop((x, y, x + width, y + height))


def _prompt(processor, row, prompt):
    parts = [{"type": "image"}] if "image" in row else []
    parts.append({"type": "text", "text": prompt.format(text=row.get("text", ""))})
    messages = [{"role": "user", "content": parts}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@torch.inference_mode()
def answers(model, processor, rows, prompt, names, folder=Path()) -> list[str]:
    """Return the label word with the highest logit after each row's prompt."""
    ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(names)))
    said, sheets = [], {}
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        prompts = [_prompt(processor, row, prompt) for row in part]
        pictures = [_crop(folder, row["image"], sheets) for row in part if "image" in row]
        inputs = processor(text=prompts, images=pictures or None, padding=True, return_tensors="pt")
        logits = model(**inputs).logits[:, -1][:, ids]
        said += [names[i] for i in logits.argmax(1).tolist()]
    return said


def score_tasks(model, processor, folder: Path) -> dict:
    """Score every shipped set."""
    scores = {}
    for name, task in json.loads((folder / "tasks.json").read_text()).items():
        lines = (folder / task["file"]).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        said = answers(model, processor, rows, task["prompt"], task["labels"], folder)
        groups = [row["meta"]["cluster"] for row in rows]
        scores[name] = summary(said, [row["label"] for row in rows], groups)
    return scores


def score_snippets(model, processor, texts: list[Text]) -> dict:
    """Score the held-out rated snippets by genre; their texts are not shipped."""
    scores = {}
    for genre in ("tweet", "film", "product", "news"):
        held = [t for t in texts if t.side == "test" and t.genre == genre and t.valence]
        rows = [{"text": t.text} for t in held]
        said = answers(model, processor, rows, "{text} tone", VALENCE)
        scores[f"valence {genre}"] = summary(said, [t.valence for t in held])
    return scores


def measure_folder(out: Path, texts: list[Text]) -> dict:
    """Return checkpoint -> set -> score for the three saved checkpoints."""
    result = {}
    for name in NAMES:
        model, processor = load(out / name)
        result[name] = score_tasks(model, processor, out / "tasks")
        result[name] |= score_snippets(model, processor, texts)
    return result
