"""A module as its names and shapes show it, and what can be asked of its surroundings."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from affectlens.sites.names import words

Shape = tuple[int, ...]

# Names of the attention projections, as transformers and remote code have them.
Q = words(
    r"""
    q q_proj query to_q [wW]q linear_q q_lin q_head query_net query_proj projection_query to_query
    project_q query_layer q_attn query_global [we]2[we]_query
    """
)
K = words(
    r"""
    k k_proj key to_k [wW]k linear_k k_lin k_head key_net key_proj projection_key to_key project_k
    key_layer key_protein key_global
    """
)
V = words(
    r"""
    v v_proj value to_v [wW]v linear_v v_lin v_head value_net value_proj projection_value project_v
    value_layer value_protein value_global v_proj_(?:current|delayed)
    """
)
KV = words(r"kv to_kv kv_proj kv_linear keys_values")
_ATTENTION = re.compile(r"(?i)att(?:n|ention)?s?(?:_|\.|\d|$)|selfattention|decattention|mha\b|xattn")
_MOE = re.compile(r"(?:^|\.)(?:\w*_)?(?:experts|mlp|moe|feed_forward|ffn|mixer|block_sparse_moe)$")


class Module(NamedTuple):
    """One module: where it is, its parameters, and what is beside it over all layers."""

    tower: str
    layered: bool
    local: str  # the path below the layer
    params: Mapping[str, Shape]  # by `weight`, `bias` or `param`
    siblings: Mapping[str, Shape]  # the names beside it, with the shape of their weight where they have one
    vocabulary: frozenset[int] = frozenset()  # the lengths of the tables of tokens

    @property
    def leaf(self) -> str:
        """The module's own name."""
        return self.local.rpartition(".")[2]

    @property
    def parents(self) -> str:
        """The path that leads to it, below the layer."""
        return self.local.rpartition(".")[0]

    @property
    def ndim(self) -> int:
        """The dimensions of its weight."""
        return len(self.params.get("weight", self.params.get("param", (0,))))


Need = Callable[[Module], bool]


def both(*needs: Need) -> Need:
    """All of these."""
    return lambda module: all(need(module) for need in needs)


def bare(module: Module) -> bool:
    """A parameter of its own, not the weight or bias of a layer."""
    return "param" in module.params


def vector(module: Module) -> bool:
    """A layer whose weight is a vector: only norms have one."""
    return len(module.params.get("weight", ())) == 1


def convolution(module: Module) -> bool:
    """A layer whose weight has three dimensions or more and is no stack of experts."""
    return len(module.params.get("weight", ())) >= 3 and not re.search(r"experts|(?:^|\.)moe\.", module.local)


def in_attention(module: Module) -> bool:
    """Inside an attention: its path says so, or a q and a k are beside it."""
    if _ATTENTION.search(module.parents):
        return True
    return (
        "attn" not in module.siblings and _beside(module, Q) and (_beside(module, K) or _beside(module, KV))
    )


def in_state_space(module: Module) -> bool:
    """Inside a state space or a linear attention."""
    return bool(module.siblings.keys() & {"A_log", "dt_proj", "dt_bias", "forget_gate", "rg_lru"})


def near_experts(module: Module) -> bool:
    """Where a router would be."""
    return "experts" in module.siblings or bool(_MOE.search(module.parents))


def outside_layers(module: Module) -> bool:
    """Not in a layer."""
    return not module.layered


def as_long_as_the_vocabulary(module: Module) -> bool:
    """Outside the layers, with one output (or bias) a token."""
    lengths = {shape[0] for shape in module.params.values() if shape}
    return not module.layered and bool(lengths & module.vocabulary)


def attention_matrix(module: Module) -> bool:
    """A projection of an attention, which may be a convolution."""
    return bool(re.fullmatch(rf"{Q}|{K}|{V}|out_proj|o_proj|proj_out", module.leaf)) and in_attention(module)


def _beside(module: Module, pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in module.siblings)
