"""One record a stored tensor: all that is known of it, for machines to read."""

from typing import Any

from affectlens.sites.laying import Laid


def record(tensor: str, laid: Laid, *, dtype: str) -> dict[str, Any]:
    """Describe a tensor as JSON has it.

    `fused` says how its parts lie: of every `period` indices along `dim` (of all `size` of them, where
    the layout is "concat"), `slices` give the role from `start` to `stop`. `expert` is a number, or
    "stacked" for all experts along the first dimension.
    """
    at = laid.place.position
    return {
        "disk": tensor,
        "mem": [laid.memory],
        "tower": at.tower,
        "stack": at.stack,
        "layer": at.layer,
        "role": laid.place.role,
        "param": laid.param,
        "fused": _fused(laid),
        "expert": laid.expert,
        "block": laid.block,
        "transposed": "conv1d(in,out)" if laid.transposed and laid.block != "expert" else None,
        "shape": list(laid.shape),
        "dtype": dtype,
    }


def _fused(laid: Laid) -> dict[str, Any] | None:
    if laid.fused is None:
        return None
    dim, size, layout, period, slices = laid.fused
    parts = [{"role": role, "start": start, "stop": stop} for role, start, stop in slices]
    periodic = {} if layout == "concat" else {"period": period}
    return {"dim": dim, "size": size, "layout": layout, **periodic, "slices": parts}
