"""Load a model and its processor as a lens.

    source ──▶ Checkpoint ── building ──────▶ model ┐
       └── isolation: clean copies ──▶ processor ───┴─▶ Lens

A parameter that the files lack is an error, not a random weight. Files of a stranger can't make transformers
run code, download or read anything else, unless the user allows it.
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

from affectlens.checkpoints import Checkpoint, Source, open_checkpoint
from affectlens.checkpoints.chat_templates import NAMES, ChatTemplate, chat_template
from affectlens.checkpoints.folders import BESIDE_CODE, KNOWN, inside, open_store
from affectlens.checkpoints.hub.downloading import fetched
from affectlens.checkpoints.opening import local, named_on_hub
from affectlens.checkpoints.quantized import unpacked
from affectlens.errors import AffectlensError, CheckpointError, LensError, MissingExtra, near, quoted
from affectlens.lens.building import build, refuse_unreasonable
from affectlens.lens.failures import broken, line, out_of_memory
from affectlens.lens.inputs.processors import load_processor
from affectlens.lens.isolation import isolated, refuse_own_code, remote_code, torch_dtype
from affectlens.lens.lens import Lens

_ONE_AT_A_TIME = RLock()  # loading changes settings of the whole process
DEVICE = "AFFECTLENS_DEVICE"  # the device of every lens that is loaded without `device`
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def load(
    source: str | Path | Checkpoint,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | Mapping[str, str | int | torch.device] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    cue: str = "",
) -> Lens:
    """Load a checkpoint (a folder, a hub id, or an open checkpoint) as a lens.

    `device` is by default the environment's `AFFECTLENS_DEVICE`, else the CPU. `dtype` is a torch dtype, its
    name, or `"auto"` for the stored one. Quantised weights are unpacked.
    `device_map` spreads the model over devices with accelerate: `"auto"`, or a mapping from module names to
    devices, `"cpu"` or `"disk"`. Offloaded modules run, but their weights can't be changed; those on disk
    are kept in the temporary folder and deleted with the model. `revision` is a branch, tag or commit of a
    hub id.

    Code that comes with a model runs only with `trust_remote_code`, and is pinned: a branch is resolved to
    a commit first, and `lens.remote_code` records it. For a folder it records the hash of the code; given as
    `revision`, the hash ensures that the code has not changed. Code from another repository is refused.

    `template_options` are passed to the chat template, e.g. `{"enable_thinking": True}`; by default it is
    told not to begin a thought, if it can be. `cue` is written behind each prompt, e.g. `"</think>"` where a
    template always begins a thought.

    Raises `CheckpointError` for unreadable files, `MissingExtra` for a `device_map` without accelerate, and
    `LensError` where the files lack an untied parameter, or where transformers can't build the model.

    >>> import affectlens as al
    >>> lens = al.load(al.load_demo().base)
    >>> lens
    Lens(LlavaForConditionalGeneration: 3,081,568 parameters, bfloat16, cpu)
    >>> lens.logits(al.Example("1", "happy", text="what a lovely day")).shape
    torch.Size([1, 5420])
    """
    wanted = _dtype(dtype)
    _refuse_unplaceable(device, device_map)
    folder, checkpoint, commit = _found(source, revision, code=trust_remote_code)
    name = checkpoint.store.name
    if checkpoint.change is not None:
        raise LensError(f"{name} is an adapter. Load its base, and apply it with Transplant(…, donor=…)")
    if not (folder / "config.json").exists():
        raise CheckpointError(folder, "no config.json here, so the model can't be built")
    refuse_unreasonable(checkpoint)
    with isolated(folder, code=trust_remote_code) as room, _alone(online=trust_remote_code):
        if not trust_remote_code:
            refuse_own_code(name, checkpoint.config)
        pinned = partial(remote_code, room, name=name, commit=commit, asked=revision or "")
        ran = pinned() if trust_remote_code else None
        own = ran is not None
        make = partial(build, room, checkpoint, dtype=wanted, code=own)
        model = _built(lambda: _placed(make, device=device, device_map=device_map), checkpoint, room)
        processor, unread = load_processor(room, name=name, code=own)
    _name_after(folder, model, processor)
    lens = Lens(model, processor, source=checkpoint, remote_code=ran)
    lens.template_options, lens.cue, lens.unread = dict(template_options or {}), cue, unread
    return lens


def load_template(source: Source) -> ChatTemplate | None:
    """Return the chat template in the files of a checkpoint or an adapter; None where they have none.

    Raises `CheckpointError` for a file that can't be read.
    """
    folder = _found(source, None, code=False)[0]
    return chat_template({name: inside(folder, name) for name in NAMES if (folder / name).exists()})


def _name_after(folder: Path, *parts: Any) -> None:
    """Set the name that PEFT and others save: the copies that transformers saw are deleted by now."""
    for part in parts:
        one = getattr(part, "config", None) or getattr(part, "tokenizer", part)
        if one is not None:
            one.name_or_path = str(folder)


def _dtype(asked: str | torch.dtype) -> torch.dtype | None:
    """Return the dtype to load in; None for "auto". Raises `LensError` for another name."""
    found = torch_dtype(asked) if isinstance(asked, str) else asked
    if asked == "auto" or isinstance(found, torch.dtype):
        return found
    raise LensError(f"unknown dtype {asked!r}: give a floating-point dtype of torch, its name, or 'auto'")


def _refuse_unplaceable(
    device: str | torch.device | None, device_map: str | Mapping[str, str | int | torch.device] | None
) -> None:
    """Raise `LensError` for an unknown or ambiguous placement, `MissingExtra` without accelerate."""
    if device_map is None:
        return
    if device is not None:
        raise LensError("give device or device_map, not both")
    if isinstance(device_map, str) and device_map not in _DEVICE_MAPS:
        raise LensError(
            f"unknown device_map {device_map!r}. Known: {near(device_map, _DEVICE_MAPS)}; or give a mapping "
            "from modules to devices, or device="
        )
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtra(
            'device_map needs accelerate, which isn\'t installed. Try: pip install "affectlens[tune]"'
        )


def _found(source: Source, revision: str | None, *, code: bool) -> tuple[Path, Checkpoint, str]:
    """Return the folder of a source, its checkpoint, and the commit if it comes from a hub."""
    opened = source if isinstance(source, Checkpoint) else None
    name = opened.store.source if opened else local(str(source))
    if not name:
        raise LensError("this checkpoint is only in memory; wrap its module: Lens(model, processor)")
    if os.path.exists(name):  # noqa: PTH110  for any string, where Path.exists raises
        path = Path(name)
        if revision and not code:
            raise LensError(
                f"{path.name} is a local path, so it has no revision {quoted(revision)}; leave revision out"
            )
        return path if path.is_dir() else path.parent, opened or open_checkpoint(path), ""
    repository, _, asked = named_on_hub(name).partition("@")
    asked = revision or (str(opened.store.facts.get("revision", "")) if opened else "") or asked
    hub_id = f"{repository}@{asked}" if asked else repository
    folder = fetched(hub_id, BESIDE_CODE if code else KNOWN)
    store = open_store(folder, f"{repository}@{folder.name}")
    store.name = opened.store.name if opened else name  # without the commit, which `identity` has too
    return folder, Checkpoint(unpacked(store)), folder.name


@contextmanager
def _alone(*, online: bool) -> Iterator[None]:
    """Keep transformers from using the network and from printing in the block; one block at a time."""
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
    """Build the model; turn any failure into a `LensError` of one line without a traceback.

    The frames of a traceback hold the half-built model, and a notebook keeps the last error: the model would
    stay in memory. So the error is raised outside the handler, where it gets no context either.
    """
    failure: AffectlensError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of it becomes an error here
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


def _moved(model: nn.Module, device: str | torch.device) -> nn.Module:
    try:
        return model.to(device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise LensError(
            f"the model can't be put on the device {quoted(str(device))}: {line(error)}"
        ) from None


def _placed(
    build: Callable[..., nn.Module],
    *,
    device: str | torch.device | None,
    device_map: str | Mapping[str, str | int | torch.device] | None,
) -> nn.Module:
    """Build a model and put it on its device or devices."""
    if device_map is None:
        model = build(places={})
        asked_for = device if device is not None else os.environ.get(DEVICE) or None
        return model if asked_for is None else _moved(model, asked_for)
    folder = tempfile.mkdtemp(prefix="affectlens-offloaded-")
    asked = device_map if isinstance(device_map, str) else dict(device_map)
    logger = logging.getLogger("accelerate")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that parameters are offloaded, as the user asked
    try:
        model = build(places={"device_map": asked, "offload_folder": folder})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        logger.setLevel(level)
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model
