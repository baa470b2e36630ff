"""A module described by names and shapes, and the predicates that the table of roles uses."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from affectlens.sites.names import words
from affectlens.sites.site import Shape

# Names of the attention projections in transformers and in remote code.
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
    """A module: its place, its parameters, and the names beside it in any layer."""

    tower: str
    layered: bool
    local: str  # the path below the layer
    params: Mapping[str, Shape]  # shapes by `weight`, `bias` or `param`
    siblings: Mapping[str, Shape]  # names beside it, with the shape of their weight if they have one
    vocabulary: frozenset[int] = frozenset()  # the numbers of rows of the token embeddings

    @property
    def leaf(self) -> str:
        """The module's own name."""
        return self.local.rpartition(".")[2]

    @property
    def parents(self) -> str:
        """The path of its parent, below the layer."""
        return self.local.rpartition(".")[0]

    @property
    def ndim(self) -> int:
        """The number of dimensions of its weight."""
        return len(self.params.get("weight", self.params.get("param", (0,))))


Need = Callable[[Module], bool]


def both(*needs: Need) -> Need:
    """Combine predicates: all must hold."""
    return lambda module: all(need(module) for need in needs)


def bare(module: Module) -> bool:
    """Match a bare parameter, which is not the weight or bias of a module."""
    return "param" in module.params


def vector(module: Module) -> bool:
    """Match a module whose weight is a vector: only norms have one."""
    return len(module.params.get("weight", ())) == 1


def convolution(module: Module) -> bool:
    """Match a weight of three dimensions or more, unless it is a stack of experts."""
    return len(module.params.get("weight", ())) >= 3 and not re.search(r"experts|(?:^|\.)moe\.", module.local)


def in_attention(module: Module) -> bool:
    """Match the inside of an attention: its path says so, or a q and a k are beside it."""
    if _ATTENTION.search(module.parents):
        return True
    # A block that has the attention as a child is not inside of it.
    return (
        "attn" not in module.siblings and _beside(module, Q) and (_beside(module, K) or _beside(module, KV))
    )


def in_state_space(module: Module) -> bool:
    """Match the inside of a state space model or a linear attention."""
    return bool(module.siblings.keys() & {"A_log", "dt_proj", "dt_bias", "forget_gate", "rg_lru"})


def near_experts(module: Module) -> bool:
    """Match the places where a router can be: beside experts, or in an MLP."""
    return "experts" in module.siblings or bool(_MOE.search(module.parents))


def outside_layers(module: Module) -> bool:
    """Match a module outside of the layers."""
    return not module.layered


def as_long_as_the_vocabulary(module: Module) -> bool:
    """Match a module outside of the layers with one output for each token."""
    # An output embedding under another name: only its length tells.
    lengths = {shape[0] for shape in module.params.values() if shape}
    return not module.layered and bool(lengths & module.vocabulary)


def attention_matrix(module: Module) -> bool:
    """Match an attention's projection, which may be a convolution."""
    return bool(re.fullmatch(rf"{Q}|{K}|{V}|out_proj|o_proj|proj_out", module.leaf)) and in_attention(module)


def _beside(module: Module, pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in module.siblings)
