"""Compute logits in float32 from a model in half precision.

A bfloat16 has 8 bits, so the logits of words that may answer a question often tie, and argmax takes
the first. The hidden state tells them apart: its product with the output matrix is computed in float32.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from affectlens.lens.live import answering, inner

_AT_ONCE = 2**25  # weights that are converted at a time, 128 MiB


@contextmanager
def logits_in_float32(model: nn.Module) -> Iterator[None]:
    """Let the output matrix compute in float32 during the block; what the model does behind it follows.

    An output matrix in other storage (quantised, offloaded) computes as before.
    """
    with ExitStack() as stack:
        for linear in _outputs(model):
            # Before the hooks of interventions, which change what the matrix gives.
            handle = linear.register_forward_hook(_again, prepend=True)
            stack.callback(handle.remove)
        yield


def _outputs(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers that give logits: an adapter has its own beside the model's."""
    try:
        head = inner(answering(model)).get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    found = [
        module
        for module in (head.modules() if isinstance(head, nn.Module) else ())
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    ]
    widest = max((linear.out_features for linear in found), default=0)
    halves = (torch.float16, torch.bfloat16)
    return [
        one
        for one in found
        if one.out_features == widest and one.weight.dtype in halves and not one.weight.is_meta
    ]


def _again(linear: nn.Linear, args: tuple[Any, ...], output: Tensor) -> Tensor:
    values, weight = args[0].to(linear.weight.device).float(), linear.weight
    rows = max(1, _AT_ONCE // weight.shape[1])
    found = torch.cat([values @ part.float().T for part in torch.split(weight, rows)], dim=-1)
    return (found if linear.bias is None else found + linear.bias.float()).to(output.device)
