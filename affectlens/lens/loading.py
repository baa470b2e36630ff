"""Load a model and its processor; a parameter the files do not hold is an error, not a random weight."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from affectlens.checkpoints import Checkpoint, open_checkpoint
from affectlens.checkpoints.opening import download
from affectlens.errors import AffectlensError, CheckpointError, LensError
from affectlens.lens.lens import Lens

_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def load(
    source: str | Path | Checkpoint,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
) -> Lens:
    """Load a checkpoint (a folder, a hub id, or one already open) as a lens.

    `dtype` is a torch dtype, its name, or `"auto"`: the stored one. No remote code is run. Raises
    `CheckpointError` where nothing can be loaded, and `LensError` where the files lack a parameter of
    the model that is not tied to another.
    """
    from transformers import AutoConfig

    checkpoint = open_checkpoint(source)
    name = checkpoint.store.source
    if not name:
        raise LensError("this checkpoint is only in memory; wrap its module: Lens(model, processor)")
    path = Path(name) if Path(name).exists() else download(name, _FILES)
    path = path.parent if path.is_file() else path
    if not (path / "config.json").is_file():
        raise CheckpointError(path, "no config.json here, so no model can be built")
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if wanted != "auto" and not isinstance(wanted, torch.dtype):
        raise LensError(f"torch has no dtype {dtype!r}")
    options: dict[str, Any] = {"dtype": wanted, "use_safetensors": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with _no_bar():
            model, info = _auto_class(config).from_pretrained(path, **options, output_loading_info=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, AffectlensError):
            raise
        raise LensError(
            f"{path.name}: transformers can't load this: {' '.join(str(error).split())[:300]}"
        ) from error
    _refuse_random(path, info)
    return Lens(model.to(device) if device is not None else model, _processor(path), source=checkpoint)


@contextmanager
def _no_bar() -> Iterator[None]:
    # A library that is called in loops does not draw on the terminal.
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _auto_class(config: Any) -> Any:
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # What the files were saved from; an automatic class may take a part, as it does of Whisper its decoder.
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None) if isinstance(name, str) and "For" in name else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for kind in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in kind._model_mapping:
            return kind
    raise LensError(f"transformers knows no model of type {config.model_type!r} that could be loaded here")


def _refuse_random(path: Path, info: dict[str, Any]) -> None:
    random = sorted({str(key) for key in info["missing_keys"]} | {str(k) for k in info["mismatched_keys"]})
    if random:
        more = f" and {len(random) - 3} more" if len(random) > 3 else ""
        raise LensError(
            f"{path.name}: the files lack {', '.join(random[:3])}{more}, which would be random weights. "
            "Is this a whole checkpoint of that model?"
        )


def _processor(path: Path) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    for kind in (AutoProcessor, AutoTokenizer):
        try:
            return kind.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError):
            continue
    return None
