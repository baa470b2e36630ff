"""Load a model and its processor; a parameter the files do not hold is an error, not a random weight.

    source ──▶ Checkpoint ── building ──▶ model ┐
       └── isolating: clean copies of the rest ─┴─▶ Lens

Whatever the files of a stranger say, nothing is executed, fetched or read elsewhere, unless asked for.
"""

import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import nn

from affectlens.checkpoints import Checkpoint, open_checkpoint
from affectlens.checkpoints.folders import BESIDE_CODE, KNOWN, open_store
from affectlens.checkpoints.hub.downloading import fetched
from affectlens.checkpoints.opening import named_on_hub
from affectlens.checkpoints.quantized import unpacked
from affectlens.errors import AffectlensError, CheckpointError, LensError, MissingExtra, near, quoted
from affectlens.lens.building import build, refuse_unreasonable
from affectlens.lens.inputs.processors import load_processor
from affectlens.lens.isolation import isolated, refuse_own_code, remote_code, torch_dtype
from affectlens.lens.lens import Lens
from affectlens.lens.running import broken, line

_ONE_AT_A_TIME = RLock()  # what is set while a model is loaded is set for the whole process
_WAYS = ("auto", "balanced", "balanced_low_0", "sequential")


def load(
    source: str | Path | Checkpoint,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Lens:
    """Load a checkpoint (a folder, a hub id, or one already open) as a lens.

    `dtype` is a torch dtype, its name, or `"auto"`: the stored one. Quantised weights are unpacked.
    `device_map` spreads a model over devices with accelerate: `"auto"`, or a mapping from the names of
    modules to devices, `"cpu"` or `"disk"`. What is offloaded runs all the same, and its weights can't be
    changed; what goes to disk is written to the temporary folder, and is gone with the model.
    `revision` is a branch, tag or commit of a hub id.

    Code that comes with a model is run only with `trust_remote_code`. A branch is then a commit before
    any of it is seen, and `lens.remote_code` says which; of a folder it says the hash of the code, and as
    `revision` that hash makes sure that the code is still the same. Code of other repositories is refused.

    Raises `CheckpointError` where nothing can be loaded, `MissingExtra` for a `device_map` without
    accelerate, and `LensError` where the files lack a parameter of the model that is not tied to another, or
    hold what transformers can't make a model of.
    """
    wanted = _dtype(dtype)
    _refuse_unplaceable(device, device_map)
    folder, checkpoint, commit = _found(source, revision, code=trust_remote_code)
    name = checkpoint.store.name
    if checkpoint.change is not None:
        raise LensError(f"{name} is an adapter; load its base, and put it on with Transplant(…, donor=…)")
    if not (folder / "config.json").exists():
        raise CheckpointError(folder, "no config.json here, so no model can be built")
    refuse_unreasonable(checkpoint)
    with isolated(folder, code=trust_remote_code) as room, _alone(online=trust_remote_code):
        ran = None
        if trust_remote_code:
            ran = remote_code(room, name=name, commit=commit, asked=revision or "")
        else:
            refuse_own_code(name, checkpoint.config)
        own = ran is not None
        make = partial(build, room, checkpoint, dtype=wanted, code=own)
        model = _built(lambda: _placed(make, device=device, device_map=device_map), checkpoint, room)
        processor, unread = load_processor(room, name=name, code=own)
    # What others go by who are given the model; the folder of copies is gone.
    for one in (getattr(model, "config", None), getattr(processor, "tokenizer", processor)):
        if one is not None:
            one.name_or_path = str(folder)
    return Lens(model, processor, source=checkpoint, remote_code=ran, unread=unread)


def _dtype(asked: str | torch.dtype) -> torch.dtype | None:
    found = torch_dtype(asked) if isinstance(asked, str) else asked
    if asked == "auto" or isinstance(found, torch.dtype):
        return found
    raise LensError(f"torch has no dtype {asked!r} that a model could be run in")


def _refuse_unplaceable(
    device: str | torch.device | None, device_map: str | Mapping[str, Any] | None
) -> None:
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


def _found(
    source: str | Path | Checkpoint, revision: str | None, *, code: bool
) -> tuple[Path, Checkpoint, str]:
    """The folder of a source, what is in it, and its commit where that is a hub's."""
    opened = source if isinstance(source, Checkpoint) else None
    name = opened.store.source if opened else str(source)
    if not name:
        raise LensError("this checkpoint is only in memory; wrap its module: Lens(model, processor)")
    if os.path.exists(name):  # noqa: PTH110  for any string, where Path.exists raises
        path = Path(name)
        if revision and not code:
            raise LensError(f"{path.name} is no hub id, so it has no revision {quoted(revision)}")
        return path if path.is_dir() else path.parent, opened or open_checkpoint(path), ""
    repository, _, asked = named_on_hub(name).partition("@")
    asked = revision or (str(opened.store.facts.get("revision", "")) if opened else "") or asked
    hub_id = f"{repository}@{asked}" if asked else repository
    folder = fetched(hub_id, BESIDE_CODE if code else KNOWN)
    store = open_store(folder, f"{repository}@{folder.name}")
    store.name = opened.store.name if opened else name  # the commit stands beside it, as the revision
    return folder, Checkpoint(unpacked(store)), folder.name


@contextmanager
def _alone(*, online: bool) -> Iterator[None]:
    """Let transformers neither ask a hub nor write on the terminal: the error is ours to tell."""
    from huggingface_hub import constants
    from transformers.utils import logging

    with _ONE_AT_A_TIME:
        before = constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled()
        constants.HF_HUB_OFFLINE = before[0] or not online
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before[0]
            logging.set_verbosity(before[1])
            if before[2]:
                logging.enable_progress_bar()


def _built(make: Callable[[], nn.Module], checkpoint: Checkpoint, room: Path) -> nn.Module:
    """The model, or a `LensError` of one line that holds on to nothing.

    The frames that something broke in hold the model: where errors are kept, as a notebook does, it would
    fill the memory. Raised inside a handler the error would know them as its context.
    """
    failure: AffectlensError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what transformers finds odd is told where it matters
            return make()
    except AffectlensError as error:
        failure = error.with_traceback(None)
    except BaseException as error:
        if not broken(error):
            raise
        why = line(error).replace(str(room), room.name)
        failure = LensError(f"{checkpoint.store.name}: transformers can't load this: {why}")
    failure.__context__ = failure.__cause__ = None
    raise failure


def _placed(
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
