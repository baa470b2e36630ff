"""Adapters that contradict themselves, lie about their base, or would keep a reader busy for ever."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.hostile.case import Case
from tests.hostile.corpus.adapter_configs import CONFIGS, EVIL, TEXTS
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
    """Return factors of one layer's gate and another layer's up."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for module in (_GATE, _UP):
        found[f"{module}.lora_A.weight"] = 0.1 * torch.randn(2, 8, generator=draw)
        found[f"{module}.lora_B.weight"] = 0.1 * torch.randn(16, 2, generator=draw)
    return found


def _written(
    root: Path, *, config: object = CONFIG, change: Change | None = None, verb: str = "diff"
) -> list[str]:
    """Write an adapter with this config, or a text in its place, and changed factors."""
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
    """Add magnitudes for both pairs, or instead of one."""
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


def _claimed(found: Tensors) -> None:
    """Add a second pair for the gate, without PEFT's prefix in its name."""
    found.update({name.removeprefix("base_model.model."): 2 * found[name] for name in (_A, _B)})


def _turned(found: Tensors) -> None:
    found[_A], found[_B] = found[_B], found[_A]


def _typed(dtype: torch.dtype, *names: str) -> Change:
    return lambda found: found.update({name: found[name].to(dtype) for name in names})


_A, _B = f"{_GATE}.lora_A.weight", f"{_GATE}.lora_B.weight"
_MAGNITUDE = f"{_GATE}.lora_magnitude_vector"
# name, what is done to the factors, what must be said, also without the base
_FACTORS: tuple[tuple[str, Change, str], ...] = (
    ("A without B", _gone(_B), "gate_proj.weight': lora_A without lora_B"),
    ("B without A", _gone(_A), "gate_proj.weight': lora_B without lora_A"),
    ("magnitudes alone", partial(_dora, only=True), "lora_magnitude_vector without lora_A"),
    ("too few magnitudes", _set(_MAGNITUDE, torch.ones(3)), "magnitudes of shape (3,) for 16 rows"),
    ("no rank at all", _rankless, "can't be multiplied"),
    ("a rank of 100,000", _endless, "rank 100,000 is too high"),
    ("ranks that differ", _set(_A, torch.ones(3, 8)), "shapes (16, 2) and (3, 8) can't be multiplied"),
    ("vectors", _set(_A, torch.ones(8)), "factors of shapes (16, 2) and (8,) can't be multiplied"),
    ("A for B", _turned, "factors of shapes (2, 8) and (16, 2) can't be multiplied"),
    ("two adapters", _set(f"{_GATE}.lora_A.other.weight", torch.ones(2, 8)), "holds several adapters"),
    ("two pairs for one parameter", _claimed, f"names the same parameter as '{_GATE}.weight'"),
    ("A twice", _set(f"{_GATE}.lora_A", torch.ones(2, 8)), f"names the same factor as '{_GATE}.lora_A'"),
    ("A twice, once of an embedding", _set(f"{_GATE}.lora_embedding_A", torch.ones(2, 8)), "the same factor"),
    ("a variant's tensors", _set(f"{_GATE}.lora_C.weight", torch.ones(2, 2)), "an unknown variant of LoRA"),
    ("an unknown tensor", _set(f"{_GATE}.lora_evil.weight", torch.ones(2, 2)), "an unknown variant of LoRA"),
    ("A of whole numbers", _typed(torch.int32, _A), f"'{_A}': a factor of int32"),
    ("B of bytes", _typed(torch.uint8, _B), f"'{_B}': a factor of uint8"),
    ("B of truths", _typed(torch.bool, _B), f"'{_B}': a factor of bool"),
    ("A in fp8", _typed(torch.float8_e4m3fn, _A), f"'{_A}': a factor of float8_e4m3fn"),
    ("both in fp8", _typed(torch.float8_e5m2, _A, _B), f"'{_A}': a factor of float8_e5m2"),
    ("magnitudes of whole numbers", _set(_MAGNITUDE, torch.ones(16).int()), "a factor of int32"),
)  # fmt: skip
# The same, of what only its values or its base can tell.
_UNFIT: tuple[tuple[str, Change, str], ...] = (
    ("NaN in A", _nan(_A), f"'{_A}': NaN or infinity"),
    ("NaN in B", _nan(_B), f"'{_B}': NaN or infinity"),
    ("infinity in B", _set(_B, torch.full((16, 2), np.inf)), f"'{_B}': NaN or infinity"),
    ("another width", _set(_A, torch.ones(2, 9)), "its factors make (16, 9), base has (16, 8)"),
    ("layers that base has not", _renamed("layers.", "layers.9"), "none of the 2 LoRA pairs"),
    ("another model's names", _renamed("mlp", "feed_me"), "none of the 2 LoRA pairs"),
)

_SKIPPED = "changes a parameter that base does not have"
_BASE, _WEB = "base_model_name_or_path", "https://evil.example/x"
_TARGETS, _LAYERS = "outside its target_modules", "outside its layers_to_transform"
# name, settings, change, what must be said, also without the base
_NOTED: tuple[tuple[str, dict[str, object], Change | None, str], ...] = (
    ("targets without factors", {"target_modules": ["zorb"]}, None, f"2 modules with factors are {_TARGETS}"),
    ("factors beside targets", {"target_modules": ["gate_proj"]}, None, "first: 'model.layers.1.mlp.up"),
    ("targets with colours", {"target_modules": ["\x1b[31mred"]}, None, _TARGETS),
    ("layers without factors", {"layers_to_transform": [99]}, None, f"2 modules with factors are {_LAYERS}"),
    ("one layer without factors", {"layers_to_transform": 99}, None, _LAYERS),
    ("layers by an evil pattern", {"layers_to_transform": [99], "layers_pattern": "(a+)+$"}, None, _LAYERS),
    ("alpha is negative", {"lora_alpha": -4}, None, "alpha is negative (-4)"),
    ("a pattern's alpha is negative", {"alpha_pattern": {"up_proj": -3}}, None, "alpha is negative (-3)"),
    ("magnitudes without DoRA", {"use_dora": False}, _dora, "its config does not set use_dora"),
)  # fmt: skip
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
    ("targets that take for ever", {"target_modules": f"(a+)+$|{EVIL}"}, None, "gate_proj"),
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
    """Write an adapter and a whole model into one folder."""
    argv = _written(root)
    save_file(tensors(seed=1), root / "input" / "model.safetensors")
    return argv


def _evil(root: Path, *, name: str) -> list[str]:
    """Write a pickle that would run a command, as the factors or beside them."""
    argv = _written(root)
    if name == "adapter_model.bin":
        (root / "input" / _FILE).unlink()
    zipped(root / "input" / name, pickled(x=call("posix.system", text(f"touch {root}/ran"))))
    return argv


def _nothing(root: Path) -> list[str]:
    """Write a config without factors."""
    argv = _written(root, verb="inspect")
    (root / "input" / _FILE).unlink()
    return argv


def _case(name: str, build: partial[list[str]], *says: str, told: bool = False) -> Case:
    return Case(f"adapter: {name}", "adapters", build, "told" if told else "refused", says)


_LONE = (("diff", "No file gives LoRA's alpha"), ("inspect", "alpha in no file"))
CASES: tuple[Case, ...] = (
    *(
        _case(name, partial(_configured, settings=settings), "input", words)
        for name, settings, words in CONFIGS
    ),
    *(
        _case(f"{name}, on sight", partial(_configured, settings=settings, verb="inspect"), "input", words)
        for name, settings, words in CONFIGS
    ),
    *(_case(f"config: {name}", partial(_written, config=whole), words) for name, whole, words in TEXTS),
    *(
        _case(name, partial(_written, change=change), "input", words)
        for name, change, words in (*_FACTORS, *_UNFIT)
    ),
    *(
        _case(f"{name}, on sight", partial(_written, change=change, verb="inspect"), "input", words)
        for name, change, words in _FACTORS
    ),
    *(
        _case(f"{name}, on sight", partial(_written, change=change, verb="inspect"), words, told=True)
        for name, change, words in (
            ("NaN in A", _nan(_A), "gate_proj"),
            ("another width", _set(_A, torch.ones(2, 9)), "up_proj"),
        )
    ),
    *(
        _case(
            f"{name} ({verb})",
            partial(_configured, settings=settings, change=change, verb=verb),
            words,
            told=True,
        )
        for name, settings, change, words in _NOTED
        for verb in ("diff", "inspect")
    ),
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
        "an adapter in the same folder was not applied",
        told=True,
    ),
    *(
        _case(f"{name} would run code", partial(_evil, name=name), f"{name}: refused", "posix.system")
        for name in ("adapter_model.bin", "non_lora_trainables.bin")
    ),
    _case("no factors", partial(_nothing), "this adapter has no adapter_model.safetensors"),
)
