"""The names of an adapter's tensors: which are factors of a change, which are whole parameters.

PEFT writes `….lora_A.weight`, with the adapter's name before `weight` where the model itself was saved;
what was trained whole is under `modules_to_save`, beside the copy it replaced.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from affectlens.errors import CheckpointError, quoted

FACTOR = re.compile(
    r"\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<param>weight|bias))?$"
)
_ORIGINAL = re.compile(r"\.original_module(?=\.)")
_UNKNOWN = re.compile(r"\.lora_\w+(?:\.|$)")
_NESTED = re.compile(r"(?:\.base_layer)+$")
_SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+(?=\.[^.]+$))?(?=\.)")


@dataclass
class Pair:
    """The tensors that change one parameter by scale · B·A."""

    a: str = ""
    b: str = ""
    magnitude: str = ""
    embedding: bool = False


@dataclass
class Sorted:
    """An adapter's tensors by what they are."""

    pairs: dict[str, Pair] = field(default_factory=dict)  # by the parameter they change
    whole: dict[str, str] = field(default_factory=dict)  # tensor → the parameter it is
    rest: dict[str, str] = field(default_factory=dict)  # tensor → why it is left out


def owner_of(tensor: str) -> str:
    """The parameter that a tensor of an adapter changes, or is."""
    match = FACTOR.search(tensor)
    if match is None:
        return _SAVED.sub("", _ORIGINAL.sub("", tensor))
    return f"{tensor[: match.start()]}.{match['param'] or 'weight'}"


def sort(names: Iterable[str], source: str, *, bare: frozenset[str] = frozenset()) -> Sorted:
    """Sort the tensors of an adapter; raises `CheckpointError` for a factor twice, or without the other.

    `bare` are modules, e.g. experts, whose own parameters are adapted: PEFT nests the factors of several
    and writes down no name of theirs, so they are left out.
    """
    found, adapters = Sorted(), set()
    for name in sorted(names):
        match = FACTOR.search(name)
        if match is None:
            if "token_adapter.trainable_tokens" in name:
                found.rest[name] = "rows of single tokens (trainable_token_indices), which are not compared"
            elif _UNKNOWN.search(name):
                fix = "Merge it into its base with PEFT first"
                raise CheckpointError(source, "a tensor of a variant of LoRA unknown here", key=name, fix=fix)
            elif _ORIGINAL.search(name):
                found.rest[name] = "the base's own copy of a module that was trained whole"
            else:
                found.whole[name] = owner_of(name)
            continue
        if _NESTED.sub("", name[: match.start()]).rpartition(".")[2] in bare:
            found.rest[name] = "factors of a bare parameter (target_parameters), which PEFT does not name"
            continue
        if match["param"] == "bias":
            found.rest[name] = "a bias of the low-rank path (lora_bias), which is not compared"
            continue
        adapters.add(match["adapter"])
        pair = found.pairs.setdefault(f"{name[: match.start()]}.weight", Pair())
        kind = match["kind"]
        pair.embedding = pair.embedding or kind.startswith("lora_embedding")
        slot = "magnitude" if kind.endswith("vector") else kind[-1].lower()
        taken = getattr(pair, slot)
        if taken and len(adapters) == 1:
            raise CheckpointError(source, f"names the same factor as {quoted(taken)}", key=name)
        setattr(pair, slot, name)
    if len(adapters) > 1:
        names_ = ", ".join(sorted(str(a) for a in adapters))
        raise CheckpointError(
            source, f"holds several adapters ({names_})", fix="Save the one to compare alone"
        )
    for owner, pair in found.pairs.items():
        if not pair.a or not pair.b:
            there, lacks = ("lora_A", "lora_B") if pair.a else ("lora_B", "lora_A")
            there = there if pair.a or pair.b else "lora_magnitude_vector"
            raise CheckpointError(source, f"{there} without {lacks}", key=owner)
    return found
