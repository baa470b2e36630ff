"""Run an unchanged part of a model once per input, however many interventions change the rest.

A sweep over language roles shows the same pictures hundreds of times; the output of the vision tower is the
same to the bit each time, so it is cached under a hash of all its inputs.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint
from affectlens.sites import Sites

_TOWERS = ("vision", "audio")


@contextmanager
def remembering_senses(model: nn.Module, live: Checkpoint, *, changed: Sites) -> Iterator[list[str]]:
    """Cache the vision and audio towers that hold none of the `changed` sites; yield their names."""
    touched = {live.storage[site].tensor for site in changed}
    with ExitStack() as stack:
        names = []
        for tower in _TOWERS:
            tensors = [where.tensor for site, where in live.storage.items() if site.tower == tower]
            name = _root(tensors)
            if name and not any(tensor.startswith(f"{name}.") for tensor in touched):
                stack.enter_context(remembering(model.get_submodule(name)))
                names.append(name)
        yield names


def _root(tensors: list[str]) -> str:
    """Return the path of the innermost module that holds all these parameters."""
    paths = [tensor.split(".")[:-1] for tensor in tensors]
    shared = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
    return ".".join(shared)


@contextmanager
def remembering(module: nn.Module) -> Iterator[dict[bytes, Any]]:
    """Cache the outputs of a module's forward pass inside a block; yield the cache.

    Only for a module whose weights and hooks stay the same inside the block.
    """
    memory: dict[bytes, Any] = {}
    forward = module.forward

    def remembered(*args: Any, **kwargs: Any) -> Any:
        digest = hashlib.blake2b(digest_size=16)
        if not _hash_into(digest, (args, kwargs)):  # an input that can't be compared
            return forward(*args, **kwargs)
        key = digest.digest()
        if key not in memory:
            memory[key] = forward(*args, **kwargs)
        return memory[key]

    shadowed = module.__dict__.get("forward")
    module.forward = remembered
    try:
        yield memory
    finally:
        # Deleting the instance's attribute uncovers the forward of the class.
        del module.forward
        if shadowed is not None:
            module.forward = shadowed


def _hash_into(digest: "hashlib.blake2b", value: object) -> bool:
    """Hash a value and its contents; return False for a type whose contents can't be hashed."""
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return True
    if isinstance(value, Mapping):
        digest.update(f"mapping {len(value)}".encode())
        # Sorted, so that the order of keyword arguments does not matter.
        return all(_hash_into(digest, item) for item in sorted(value.items()))
    if isinstance(value, list | tuple):  # the length tells [a, [b]] from [[a], b]
        digest.update(f"sequence {len(value)}".encode())
        return all(_hash_into(digest, item) for item in value)
    digest.update(f"{type(value).__name__} {value!r}".encode())
    return isinstance(value, str | int | float | bool | torch.dtype | torch.device | None)
