"""Where the parts of a model go: on one device, or spread over several, memory and disk by accelerate.

transformers gets the map together with our own tensors, so it opens no file of weights. What goes to disk
it writes anew, from those tensors, into a folder that is gone when the model is.
"""

import importlib.util
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from affectlens.errors import LensError, MissingExtra, near

_WAYS = ("auto", "balanced", "balanced_low_0", "sequential")


def refuse_unplaceable(device: str | torch.device | None, device_map: str | Mapping[str, Any] | None) -> None:
    """Raise `LensError` where it is not clear where a model goes, `MissingExtra` without accelerate."""
    if device_map is None:
        return
    if device is not None:
        raise LensError("device and device_map both say where the model goes; give one of them")
    if isinstance(device_map, str) and device_map not in _WAYS:
        raise LensError(
            f"no device_map is called {device_map!r}. Known: {near(device_map, _WAYS)}; or map modules to "
            "devices, or give device="
        )
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtra(
            "a device_map is carried out by accelerate, which isn't installed. "
            'Try: pip install "affectlens[tune]"'
        )


def placed(
    build: Callable[..., nn.Module],
    *,
    device: str | torch.device | None,
    device_map: str | Mapping[str, Any] | None,
) -> nn.Module:
    """A model that is built with what transformers is told of its places, and put where it belongs."""
    if device_map is None:
        model = build(places={})
        return model.to(device) if device is not None else model
    folder = tempfile.mkdtemp(prefix="affectlens-offloaded-")
    asked = device_map if isinstance(device_map, str) else dict(device_map)
    says, level = logging.getLogger("accelerate"), logging.getLogger("accelerate").level
    says.setLevel(logging.ERROR)  # that parameters are offloaded is what was asked for
    try:
        model = build(places={"device_map": asked, "offload_folder": folder})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        says.setLevel(level)
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model
