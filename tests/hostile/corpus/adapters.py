"""Adapters that contradict themselves, lie about their base, or would keep a reader busy for ever."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.hostile.case import Case
from tests.hostile.corpus.pairs import Change, Tensors, save, tensors
from tests.hostile.pickling import call, text, zipped
from tests.hostile.pickling import model as pickled

_GATE, _UP = ("base_model.model.model.layers.0.mlp.gate_proj", "base_model.model.model.layers.1.mlp.up_proj")
_FILE = "adapter_model.safetensors"
CONFIG: dict[str, object] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["gate_proj", "up_proj"],
    "base_model_name_or_path": "owner/base",
    "init_lora_weights": True,
}


def factors() -> Tensors:
    """Of the gate of one layer and the up of another."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for module in (_GATE, _UP):
        found[f"{module}.lora_A.weight"] = 0.1 * torch.randn(2, 8, generator=draw)
        found[f"{module}.lora_B.weight"] = 0.1 * torch.randn(16, 2, generator=draw)
    return found


def _written(
    root: Path, *, config: object = CONFIG, change: Change | None = None, verb: str = "diff"
) -> list[str]:
    """An adapter with this config, or text in place of one, and its factors changed."""
    found, folder = factors(), root / "input"
    if change is not None:
        change(found)
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in found.items()}, folder / _FILE)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "adapter_config.json").write_text(text)
    return [verb, *([str(save(root / "base", tensors()))] if verb == "diff" else []), str(folder)]


def _configured(
    root: Path, *, settings: dict[str, object], change: Change | None = None, verb: str = "diff"
) -> list[str]:
    return _written(root, config={**CONFIG, **settings}, change=change, verb=verb)


def _set(name: str, value: Tensor) -> Change:
    return lambda found: found.update({name: value})


def _nan(name: str) -> Change:
    def change(found: Tensors) -> None:
        found[name][0, 0] = np.nan

    return change


def _gone(name: str) -> Change:
    return lambda found: found.pop(name)


def _renamed(old: str, new: str) -> Change:
    def change(found: Tensors) -> None:
        for name in [name for name in found if old in name]:
            found[name.replace(old, new)] = found.pop(name)

    return change


def _dora(found: Tensors, *, only: bool = False, value: float = 1.0) -> None:
    """Magnitudes for both pairs, or in the place of one."""
    found.update({f"{module}.lora_magnitude_vector": torch.full((16,), value) for module in (_GATE, _UP)})
    if only:
        del found[_A], found[_B]


def _endless(found: Tensors) -> None:
    found.update({_A: torch.ones(100_000, 8), _B: torch.ones(16, 100_000)})


def _rankless(found: Tensors) -> None:
    found.update({_A: torch.ones(0, 8), _B: torch.ones(16, 0)})


def _zero(found: Tensors) -> None:
    found.update({name: torch.zeros_like(value) for name, value in found.items()})


def _more(found: Tensors) -> None:
    found.update({name.replace("layers.0", "layers.5"): value.clone() for name, value in found.items()})


_A, _B = f"{_GATE}.lora_A.weight", f"{_GATE}.lora_B.weight"
_MAGNITUDE, _EVIL = f"{_GATE}.lora_magnitude_vector", "([a-z._0-9]|[a-z]|\\w)+[0-9]"
# name, settings that differ, what must be said
_CONFIGS: tuple[tuple[str, dict[str, object], str], ...] = (
    ("alpha is NaN", {"lora_alpha": float("nan")}, "lora_alpha is nan, not a number"),
    ("alpha is endless", {"lora_alpha": float("inf")}, "lora_alpha is inf, not a number"),
    ("alpha is text", {"lora_alpha": "16"}, "lora_alpha is '16', not a number"),
    ("alpha is a list", {"lora_alpha": [16]}, "lora_alpha is [16], not a number"),
    ("alpha is true", {"lora_alpha": True}, "lora_alpha is True, not a number"),
    ("alpha has 300 digits", {"lora_alpha": 10**300}, "not a number"),
    ("rank is zero", {"r": 0}, "its config says r 0, which is no rank"),
    ("rank is negative", {"r": -2}, "its config says r -2, which is no rank"),
    ("rank is text", {"r": "2"}, "its config says r '2', which is no rank"),
    ("rank is a fraction", {"r": 2.5}, "its config says r 2.5, which is no rank"),
    ("rank is true", {"r": True}, "its config says r True, which is no rank"),
    ("rank is a section", {"r": {"a": [1]}}, "which is no rank"),
    ("rank has 300 digits", {"r": 10**300}, "which is no rank"),
    (
        "rank is another than that of the factors",
        {"r": 8},
        "its factors have rank 2, and 8 is what its config",
    ),
    (
        "a pattern says another rank",
        {"rank_pattern": {"up_proj": 4}},
        "its factors have rank 2, and 4 is what",
    ),
    ("a pattern's rank is text", {"rank_pattern": {"up_proj": "4"}}, "rank_pattern is '4', not a number"),
    ("patterns are a list", {"alpha_pattern": ["a"]}, "alpha_pattern is a list, not patterns and numbers"),
    ("patterns are text", {"rank_pattern": "gate_proj"}, "rank_pattern is a str, not patterns and numbers"),
    ("a pattern's alpha is NaN", {"alpha_pattern": {"up_proj": float("nan")}}, "alpha_pattern is nan"),
    ("a pattern that takes for ever", {"alpha_pattern": {_EVIL: 3}}, "takes too long to match"),
    ("a rank's pattern that takes for ever", {"rank_pattern": {_EVIL: 3}}, "takes too long to match"),
    ("a pattern that is none", {"alpha_pattern": {"(": 3}}, "alpha_pattern '(' is not a pattern of names"),
    ("a pattern that recurs", {"alpha_pattern": {"(?R)": 3}}, "is not a pattern of names"),
    ("a pattern of 100 kB", {"alpha_pattern": {"a" * 100_000: 3}}, "is not a pattern of names"),
    ("a pattern of brackets", {"alpha_pattern": {"(" * 450 + ")" * 450: 3}}, "is not a pattern of names"),
    ("another kind", {"peft_type": "IA3"}, "a 'IA3' adapter, not LoRA"),
    ("an unknown kind", {"peft_type": "\x1b[31mEVIL"}, "adapter, not LoRA"),
    ("a list for a kind", {"peft_type": ["LORA"]}, "adapter, not LoRA"),
    (
        "a part of the base is in the factors",
        {"init_lora_weights": "pissa"},
        "'pissa' moved part of the base",
    ),
    (
        "layers are replicated",
        {"layer_replication": [[0, 10**9]]},
        "layer_replication: its layers are not those",
    ),
    ("a variant", {"use_qalora": True}, "use_qalora: its change is not that of LoRA"),
    ("DoRA without magnitudes", {"use_dora": True}, "DoRA without its magnitude vector"),
)
# name, text of adapter_config.json, what must be said
_TEXTS: tuple[tuple[str, str, str], ...] = (
    ("a list", "[]", "adapter_config.json: is not a JSON object"),
    ("nothing", "", "adapter_config.json: is not valid JSON"),
    ("brackets", "[" * 100_000, "adapter_config.json: is not valid JSON"),
    ("a hundred sections deep", '{"r":' * 100 + "2" + "}" * 100, "nested more than 64 deep"),
    ("two ranks", '{"peft_type":"LORA","r":2,"r":4}', "has the key 'r' twice"),
    ("alpha of 1e400", '{"peft_type":"LORA","r":2,"lora_alpha":1e400}', "lora_alpha is inf, not a number"),
)
# name, what is done to the factors, what must be said
_FACTORS: tuple[tuple[str, Change, str], ...] = (
    ("A without B", _gone(_B), "gate_proj.weight': lora_A without lora_B"),
    ("B without A", _gone(_A), "gate_proj.weight': lora_B without lora_A"),
    ("magnitudes alone", partial(_dora, only=True), "lora_magnitude_vector without lora_A"),
    ("too few magnitudes", _set(_MAGNITUDE, torch.ones(3)), "magnitudes of shape (3,) for 16 rows"),
    ("NaN in A", _nan(_A), f"'{_A}': NaN or infinity"),
    ("NaN in B", _nan(_B), f"'{_B}': NaN or infinity"),
    ("infinity in B", _set(_B, torch.full((16, 2), np.inf)), f"'{_B}': NaN or infinity"),
    ("no rank at all", _rankless, "make no product"),
    ("a rank of 100,000", _endless, "rank 100,000 is no low one"),
    ("ranks that differ", _set(_A, torch.ones(3, 8)), "factors of shapes (16, 2) and (3, 8) make no product"),
    ("vectors", _set(_A, torch.ones(8)), "factors of shapes (16, 2) and (8,) make no product"),
    ("another width", _set(_A, torch.ones(2, 9)), "its factors make (16, 9), base has (16, 8)"),
    ("layers that base has not", _renamed("layers.", "layers.9"), "none of the 2 LoRA pairs"),
    ("another model's names", _renamed("mlp", "feed_me"), "none of the 2 LoRA pairs"),
    ("two adapters", _set(f"{_GATE}.lora_A.other.weight", torch.ones(2, 8)), "holds several adapters"),
    ("a variant's tensors", _set(f"{_GATE}.lora_C.weight", torch.ones(2, 2)), "a variant of LoRA unknown"),
)  # fmt: skip

_SKIPPED = "changes a parameter that base does not have"
_BASE, _WEB = "base_model_name_or_path", "https://evil.example/x"
# name, settings, change, what must be said
_TOLD: tuple[tuple[str, dict[str, object], Change | None, str], ...] = (
    ("a layer that base has not", {}, _renamed("layers.1", "layers.99"), _SKIPPED),
    ("a layer of which base has another", {}, _more, _SKIPPED),
    ("a base elsewhere", {_BASE: "../../../../etc"}, None, "names 'etc' as its base"),
    ("a base in the file system", {_BASE: "/etc/passwd"}, None, "names 'passwd' as its base"),
    ("a base on the web", {_BASE: _WEB}, None, "names 'x' as its base"),
    ("a base that is a list", {_BASE: ["a"]}, None, "gate_proj"),
    ("a base with colours", {_BASE: "\x1b[31mred\u202e"}, None, "as its base"),
    ("a base of 100 kB", {_BASE: "b" * 100_000}, None, "as its base"),
    ("targets that take for ever", {"target_modules": f"(a+)+$|{_EVIL}"}, None, "gate_proj"),
    ("targets of a million", {"target_modules": ["gate_proj"] * 1_000_000}, None, "gate_proj"),
    ("targets that are a section", {"target_modules": {"a": [[]]}}, None, "gate_proj"),
    ("odd modules to save", {"modules_to_save": [None, {"a": 1}]}, None, "gate_proj"),
    ("odd targets by parameter", {"target_parameters": [None, 3, "a", ".", "a.b."]}, None, "gate_proj"),
    ("code of its own", {"auto_mapping": {"parent_library": "os"}}, None, "gate_proj"),
    ("a revision elsewhere", {"revision": "../../main"}, None, "gate_proj"),
    ("NaN magnitudes", {"use_dora": True}, partial(_dora, value=np.nan), "are NaN or infinite"),
    ("nothing but zeros", {}, _zero, "did not move at all"),
)


def _beside(root: Path) -> list[str]:
    """An adapter and a whole model in one folder."""
    argv = _written(root)
    save_file(tensors(seed=1), root / "input" / "model.safetensors")
    return argv


def _evil(root: Path, *, name: str) -> list[str]:
    """A pickle that would run a command, as the factors or beside them."""
    argv = _written(root)
    if name == "adapter_model.bin":
        (root / "input" / _FILE).unlink()
    zipped(root / "input" / name, pickled(x=call("posix.system", text(f"touch {root}/ran"))))
    return argv


def _nothing(root: Path) -> list[str]:
    """A config, and no factors."""
    argv = _written(root, verb="inspect")
    (root / "input" / _FILE).unlink()
    return argv


def _case(name: str, build: partial[list[str]], *says: str, told: bool = False) -> Case:
    return Case(f"adapter: {name}", "adapters", build, "told" if told else "refused", says)


_LONE = (("diff", "No file says LoRA's alpha"), ("inspect", "alpha in no file"))
CASES: tuple[Case, ...] = (
    *(
        _case(name, partial(_configured, settings=settings), "input", words)
        for name, settings, words in _CONFIGS
    ),
    *(
        _case(
            f"{name}, on sight",
            partial(_configured, settings=settings, verb="inspect"),
            "gate_proj",
            told=True,
        )
        for name, settings, _ in _CONFIGS
    ),
    *(_case(f"config: {name}", partial(_written, config=whole), words) for name, whole, words in _TEXTS),
    *(_case(name, partial(_written, change=change), "input", words) for name, change, words in _FACTORS),
    *(
        _case(name, partial(_configured, settings=settings, change=change), words, told=True)
        for name, settings, change, words in _TOLD
    ),
    *(
        _case(
            f"{name}, on sight",
            partial(_configured, settings=settings, change=change, verb="inspect"),
            "gate_proj",
            told=True,
        )
        for name, settings, change, _ in _TOLD
    ),
    *(
        _case(f"no config ({verb})", partial(_written, config=None, verb=verb), words, told=True)
        for verb, words in _LONE
    ),
    _case(
        "beside a model",
        partial(_beside),
        "an adapter lies in the same folder, and was not applied",
        told=True,
    ),
    *(
        _case(f"{name} would run code", partial(_evil, name=name), f"{name}: refused", "posix.system")
        for name in ("adapter_model.bin", "non_lora_trainables.bin")
    ),
    _case("no factors", partial(_nothing), "an adapter without adapter_model.safetensors"),
)
