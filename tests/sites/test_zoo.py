"""Roles are compared with the code of all architectures that transformers ships."""

import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from affectlens.sites import Laid
from benchmarks.conversions import TABLE, generate, write

from .conftest import Architecture

# Layouts that differ by more than renaming, splitting and stacking.
MERGED = {
    "bailing_hybrid", "kimi_linear", "olmo_hybrid", "glm5_next", "glm5_next_text",  # three filters in one
    "molmo2", "molmo2_text",  # two embeddings in one
    "inkling2", "inkling2_text",  # a list that starts at layer 1
    "ernie4_5_vl_moe",  # text and vision experts numbered through
    "t5gemma2_encoder",  # saved as the part of a model
}  # fmt: skip
ACTIVATION = r"(?:act\w*|silu|gelu|sigmoid|relu|swish|non_?lin\w*|activation\w*)"


def claims(zoo: list[Architecture], *roles: str) -> Iterator[tuple[Architecture, str, Laid]]:
    """Yield the plain matrices that get one of these roles."""
    for one in zoo:
        for tensor, laid in one.laid.items():
            if (
                laid.place.role in roles
                and laid.place.param == "weight"
                and len(laid.shape) == 2
                and not laid.fused
            ):
                yield one, tensor, laid


@cache
def source(kind: type) -> str:
    """Return the code of a class; `inspect.getsource` parses the whole file for each."""
    pattern = rf"^( *)class {kind.__name__}\b.*\n(?:(?:\1[ )].*)?\n)*"
    body = re.search(pattern, text(inspect.getfile(kind)), re.MULTILINE)
    assert body is not None, kind
    return body[0]


@cache
def text(file: str) -> str:
    return Path(file).read_text("utf-8")


def activated(one: Architecture, tensor: str) -> bool:
    """Return True if the parent module's code passes the output of this linear through an activation."""
    code = source(one.around[tensor])
    leaf = tensor.removesuffix(".weight").removesuffix(".linear").rpartition(".")[2]
    if re.search(rf"{ACTIVATION}\(\s*self\.{leaf}\(", code):
        return True
    named = re.search(rf"(\w+)\s*=\s*self\.{leaf}\(", code)
    return bool(named and re.search(rf"{ACTIVATION}\(\s*{named[1]}\b", code))


def test_the_table_of_conversions_is_that_of_the_installed_transformers(zoo: list[Architecture]) -> None:
    """Regenerate it with `python -m benchmarks.conversions` when this fails."""
    assert TABLE.read_text("utf-8") == write(
        generate((one.kind, one.name, one.rules, one.memory) for one in zoo)
    )


def test_the_zoo_is_large(zoo: list[Architecture]) -> None:
    """The tests below cover hundreds of architectures, not a few that happened to build."""
    assert len(zoo) > 550
    assert sum(len(one.memory) for one in zoo) > 50_000


def test_both_layouts_of_a_model_have_the_same_sites(zoo: list[Architecture]) -> None:
    """Other names, fused or stacked tensors of a file change no site and no shape."""
    different = set()
    for one in zoo:
        memory, disk = one.sites
        if {s: w.shape for s, w in memory.items()} != {s: w.shape for s, w in disk.items()}:
            different.add(one.kind)

    assert set() == different - MERGED


def test_every_gate_is_activated_in_the_code(zoo: list[Architecture]) -> None:
    """Each gate_proj is act(self.gate(x)) in the code; no router, attention gate or plain MLP is one."""
    found = [(one.kind, tensor, activated(one, tensor)) for one, tensor, _ in claims(zoo, "gate_proj")]

    assert len(found) > 500
    assert [] == [(kind, tensor) for kind, tensor, yes in found if not yes]


def test_no_up_is_activated_in_the_code(zoo: list[Architecture]) -> None:
    """The other factor does not go through an activation."""
    found = [(one.kind, tensor, activated(one, tensor)) for one, tensor, _ in claims(zoo, "up_proj")]

    assert len(found) > 500
    assert [] == [(kind, tensor) for kind, tensor, yes in found if yes]


def test_every_gated_product_in_the_code_is_a_gate_and_an_up(zoo: list[Architecture]) -> None:
    """If the code of an MLP multiplies act(self.x(…)) by self.y(…), x is the gate and y is up."""
    missed, total = [], 0
    for one in zoo:
        found = one.laid
        for tensor, laid in found.items():
            path, _, leaf = tensor.removesuffix(".weight").rpartition(".")
            if not tensor.endswith(".weight") or len(laid.shape) != 2 or "mlp" not in path.lower():
                continue
            product = rf"{ACTIVATION}\(\s*self\.{leaf}\(\w+\)\s*\)\s*\*\s*self\.(\w+)\("
            if match := re.search(product, source(one.around[tensor])):
                roles = laid.place.role, found[f"{path}.{match[1]}.weight"].place.role
                total += 1
                missed += [(one.kind, tensor, *roles)] * (roles != ("gate_proj", "up_proj"))

    assert total > 400
    assert [] == missed


def test_classes_agree_with_roles(zoo: list[Architecture]) -> None:
    """Norms and embeddings in the code have the role of one, linear layers do not."""
    wrong, total = [], 0
    for one in zoo:
        for tensor, laid in one.laid.items():
            kind, role = one.classes[tensor], laid.place.role
            norm = "Norm" in kind and len(laid.shape) == 1
            linear = kind in ("Linear", "Conv1D")
            embedding = kind == "Embedding" and tensor.endswith("weight")
            total += norm or linear or embedding
            wrong += [(one.kind, tensor, role)] * (norm and "norm" not in role and role != "scale")
            wrong += [(one.kind, tensor, role)] * (linear and role in ("norm", "embed_tokens", "router_bias"))
            wrong += [(one.kind, tensor, role)] * (
                embedding and role in ("fc1", "fc2", "o_proj", "q_proj", "norm")
            )

    assert total > 40_000
    assert len(wrong) <= 0.0005 * total, wrong


def test_the_table_holds_only_strings() -> None:
    """Every pattern compiles and every replacement refers to groups that its pattern has."""
    table = json.loads(TABLE.read_text("utf-8"))
    for _, _, find, put, guard in (*table["rules"], *table["legacy"]):
        groups = re.compile(find).groups
        assert all(int(number) <= groups for number in re.findall(r"\\(\d)", put)), (find, put)
        re.compile(guard or "")
