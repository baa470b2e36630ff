"""Regenerate `affectlens/sites/conversions.json` from the rules of the installed transformers.

    python -m benchmarks.conversions

transformers knows how the names in a checkpoint differ from those in memory, but only a built model has the
rules. This script builds every architecture once, without weights and with two layers, and writes its
renamings as regular expressions. Inspecting a file then needs neither transformers nor a trusted config.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from affectlens.sites.names import NUMBER, compiled

TABLE = Path(__file__).parent.parent / "affectlens" / "sites" / "conversions.json"
# The first mapping that has a model type gives its rules; classes with other rules get their own.
_HEADS = (
    "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ",
    "MASKED_LM", "CTC", "TEXT_TO_WAVEFORM", "ZERO_SHOT_IMAGE_CLASSIFICATION", "PRETRAINING",
)  # fmt: skip
_DEPTH = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|(?:en|de)coder_layers|depth|num_(?:en|de)coder_layers"
)

_MOST = {"num_experts": 8, "n_routed_experts": 8, "num_local_experts": 8, "moe_num_experts": 8}

Rule = tuple[str | None, str | None, str, str, str | None]  # scope, base, find, put, guard


def architectures() -> Iterator[tuple[str, str]]:
    """Yield every (model type, class) that transformers can build from a config."""
    from transformers.models.auto import modeling_auto

    seen = set()
    mappings = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in _HEADS] + ["MODEL_MAPPING_NAMES"]
    for mapping in mappings:
        for kind, names in getattr(modeling_auto, mapping).items():
            for name in names if isinstance(names, tuple | list) else (names,):
                bare = mapping == "MODEL_MAPPING_NAMES" and any(kind == known for known, _ in seen)
                if (kind, name) not in seen and not bare:
                    seen.add((kind, name))
                    yield kind, name


def build(kind: str, name: str) -> Any:
    """Build a model of two layers without weights; None if the default config does not allow it."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for attempt in (_shallow, _mended, _as_is):
        for make in (CONFIG_MAPPING[kind], None):
            try:
                model_class = getattr(transformers, name)
                config = attempt((make or model_class.config_class)())
                with torch.device("meta"), no_init_weights(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return model_class._from_config(config)
            except Exception:
                continue
    return None


def _shallow(config: Any) -> Any:
    for part in _parts(config):
        for key, value in list(vars(part).items()):
            if (
                isinstance(value, int)
                and (most := _MOST.get(key, 2 if _DEPTH.fullmatch(key) else value)) < value
            ):
                setattr(part, key, most)
    return config


def _as_is(config: Any) -> Any:
    return config


def _mended(config: Any) -> Any:
    """Fill in settings that some default configs leave out."""
    missing = {
        "rope_theta": 1e4,
        "pad_token_id": 0,
        "vocab_size": 1000,
        "shared_expert_intermediate_size": 96,
    }
    for part in _parts(_shallow(config)):
        for key, value in missing.items():
            if getattr(part, key, None) is None:
                setattr(part, key, value)
        heads = getattr(part, "num_attention_heads", None)
        if getattr(part, "head_dim", 0) is None and heads:
            part.head_dim = part.hidden_size // heads
        if getattr(part, "num_key_value_heads", 0) is None:
            part.num_key_value_heads = heads
        if hasattr(part, "vocabulary_map"):
            part.vocabulary_map = {"<image>": 5, "<|extra_200|>": 6}
        if hasattr(part, "layer_types") and not part.layer_types:
            part.layer_types = ["full_attention"] * part.num_hidden_layers
        if hasattr(part, "mlp_layer_types") and not part.mlp_layer_types:
            part.mlp_layer_types = ["dense"] * part.num_hidden_layers
    return config


def _parts(config: Any) -> Iterator[Any]:
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def rules(changes: Iterable[Any]) -> list[Rule]:
    """List the renamings of one tensor to one; a tensor that loading splits or joins keeps its own name."""
    found: list[Rule] = []
    for change in changes:
        sources, targets = change.source_patterns, change.target_patterns
        steps = getattr(change, "operations", ())
        guard = None
        if type(change).__name__ == "GroupWeightRename":  # norm0 becomes norm1, norm1 becomes norm2
            guard = _find(sources[0])
        elif len(targets) > 1 and len(sources) == 1 and _splits(steps) and "." in targets[0]:
            targets = [_moved(sources[0], targets[0])]
        elif len(targets) == 1 and len(sources) > 1 and steps and not any(map(_merges, steps)):
            targets = [_moved(source, targets[0]) for source in sources]
        elif len(targets) > 1 or any(map(_merges, steps)) or getattr(change, "offset", 0):
            continue
        else:
            targets = targets * len(sources)
        scope = change.scope_prefix, change.base_model_prefix
        rows = [(*scope, _find(source), put, guard) for source, put in zip(sources, targets, strict=True)]
        found += reversed(rows)
    return found


def _moved(source: str, target: str) -> str:
    """Move the name of a fused tensor to the module of its parts."""
    leaves = [part for part in re.split(r"\\?\.", source) if part]
    parts = [part for part in re.split(r"\\?\.", target) if part]
    kind = parts.pop() if parts[-1] in ("weight", "bias") else None
    leaf = leaves[-2] if kind and leaves[-1] == kind else leaves[-1]
    kind = kind if not leaf.startswith("in_proj_") else None
    moved = ".".join([*parts[:-1], leaf, *([kind] if kind else [])])
    return ("." if source.startswith((".", r"\.")) else "") + moved + ("." if source.endswith(".") else "")


def _splits(steps: Iterable[Any]) -> bool:
    return {type(step).__name__ for step in steps} <= {"Chunk", "Split", "Interleave", "PermuteForRope"}


def _merges(step: Any) -> bool:
    return type(step).__name__ == "MergeModulelist"


def _find(source: str) -> str:
    """Write the pattern as transformers compiles it: a final letter or digit ends at a word boundary."""
    pattern = source.replace("*.", r".*\.")
    return pattern + (r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else "")


def memory(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the parameters; of tied ones, one."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    every = model.named_parameters(remove_duplicate=False)
    return {name: tuple(parameter.shape) for name, parameter in every if name not in tied}


def renamings(model: Any) -> list[Rule]:
    """List the rules of a built model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return rules(get_model_conversion_mapping(model, add_legacy=False))


def generate(found: Iterable[tuple[str, str, list[Rule], Iterable[str]]]) -> dict[str, Any]:
    """Make the table from the rules of each (model type, class) and its names in memory."""
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    numbered: dict[Rule, int] = {}
    kinds: dict[str, list[int]] = {}
    classes: dict[str, list[int]] = {}
    kept: dict[str, set[str]] = {}
    stacked: dict[str, set[str]] = {}
    for kind, name, own, names in found:
        applied = [numbered.setdefault(rule, len(numbered)) for rule in own]
        if kinds.setdefault(kind, applied) != applied:
            classes[name] = applied
        kept.setdefault(kind, set()).update(fixed(own, names))
        experts = (re.search(r"(?<=\.experts\.)[a-z_]+$", each) for each in names)
        stacked.setdefault(kind, set()).update(match[0] for match in experts if match)
    return {
        "transformers": transformers.__version__,
        "legacy": [list(rule) for rule in rules(get_checkpoint_conversion_mapping("legacy"))],
        "rules": [list(rule) for rule in numbered],
        "types": {kind: applied for kind, applied in sorted(kinds.items()) if applied},
        "known": sorted(kind for kind, applied in kinds.items() if not applied),
        "classes": dict(sorted(classes.items())),
        "kept": {kind: sorted(names) for kind, names in sorted(kept.items()) if names},
        "stacked": {kind: sorted(names) for kind, names in sorted(stacked.items()) if names},
    }


def fixed(own: list[Rule], names: Iterable[str]) -> set[str]:
    """Find the names in memory that a rule for names in files would change, with N for numbers."""
    free = [compiled(rule) for rule in own if rule[4] is None]
    return {NUMBER.sub("N", name) for name in names if any(rule.rename(name) != name for rule in free)}


def write(table: dict[str, Any]) -> str:
    """Write the table as text, one rule or type in each line."""
    lines = []
    for key, value in table.items():
        if isinstance(value, str):
            lines.append(f'"{key}": "{value}"')
        elif isinstance(value, list):
            lines.append(f'"{key}": [\n' + ",\n".join(json.dumps(item) for item in value) + "\n]")
        else:
            rows = (f"{json.dumps(name)}: {json.dumps(item)}" for name, item in value.items())
            lines.append(f'"{key}": {{\n' + ",\n".join(rows) + "\n}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    built = ((kind, name, build(kind, name)) for kind, name in architectures())
    TABLE.write_text(
        write(
            generate(
                (kind, name, renamings(model), memory(model))
                for kind, name, model in built
                if model is not None
            )
        )
    )
