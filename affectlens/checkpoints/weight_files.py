"""Which files of a folder may hold weights, and what a folder without any is.

Other tools save checkpoints in forms of their own. For each, the error names the form and the command that
turns it into files that can be read.
"""

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote

from affectlens.errors import CheckpointError
from affectlens.printable import plain

_LONGEST = 80  # characters shown of each name in a list of files
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
# Names under which repositories of the hub hold a whole model.
WHOLE = re.compile(r"(?:(?:pytorch_)?model(?:-\d+-of-\d+)?|consolidated(?:\.\d+)?|(?:tf|flax)_model)\.\w+")
# Opened only so that the error can name their format.
_FOREIGN = ("*.gguf", "*.ckpt", "*.npz", "*.h5", "*.msgpack", "*.onnx")
_NOT_WEIGHTS = (
    "training_args.*", "trainer_state*", "optimizer*", "*optim_states.*", "scheduler*", "scaler*", "sampler*",
    "dataloader*", "*rng_state*", "random_states*", "tokenizer*",
)  # fmt: skip
_FOLDERS = 200  # looked into
_STEP = re.compile(r"(?:checkpoint-|global_step)(\d+)")
_DISTRIBUTED = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pth"


def weights_among(names: Iterable[str]) -> list[str]:
    """Return the names that may be files of weights, in a format that can be read."""
    return [name for name in _matching(names, _WEIGHTS) if not _matching([name], _NOT_WEIGHTS)]


def adapters_among(names: Iterable[str]) -> list[str]:
    """Return the files of weights of an adapter: all but those whose name says that they hold a model."""
    return [name for name in weights_among(names) if not WHOLE.fullmatch(name)]


def foreign_among(names: Iterable[str]) -> list[str]:
    """Return the names of weights in formats that can't be read."""
    return _matching(names, _FOREIGN)


def listed(names: list[str]) -> str:
    """Write some names as a list."""
    return ", ".join(plain(name, _LONGEST) for name in names[:6])


def mlx_adapter(folder: Path) -> CheckpointError:
    """Return the error for a folder with an adapter of MLX."""
    command = f"mlx_lm.fuse --model BASE --adapter-path {quote(str(folder))} --save-path OUT --dequantize"
    return CheckpointError(folder, "an adapter of MLX, not of PEFT", fix=f"Fuse it into its base: {command}")


def no_checkpoint(folder: Path, there: list[str]) -> CheckpointError:
    """Return the error for a folder whose files, `there`, hold no checkpoint: what it is, and what helps."""
    for reason, fix in _known(folder, there):
        return CheckpointError(folder, reason, fix=fix)
    inner = folders_with_weights(folder, there)
    if inner:
        fix = f"Name one of: {listed([str(folder / name) for name in inner])}"
        return CheckpointError(folder, "no checkpoint here, but in its folders", fix=fix)
    reason = (
        "no checkpoint here: neither model.safetensors nor model.safetensors.index.json, and no files of "
        "torch or of an adapter"
    )
    return CheckpointError(folder, reason, fix=f"In it: {listed(there) or 'nothing'}")


def folders_with_weights(folder: Path, there: list[str], *, steps: bool = True) -> list[str]:
    """Return which of the names `there` are folders with files of weights; without `steps`, of no trainer."""
    names = (name for name in there[:_FOLDERS] if steps or not _STEP.fullmatch(name))
    return [name for name in names if _holds_weights(folder / name)]


def _known(folder: Path, there: list[str]) -> Iterator[tuple[str, str]]:
    """Yield what a folder is, if its names tell, with the command that helps."""
    at = quote(str(folder))
    if any(name.endswith(".distcp") for name in there):
        yield (
            "a checkpoint of torch.distributed (DCP), in shards",
            f"Join them: {_DISTRIBUTED.format(folder=at)}",
        )
    for name in sorted(_matching(there, ("pytorch_model_fsdp*", "distcp*", "sharded_state*"))):
        yield (
            "a checkpoint of FSDP, in shards",
            f"Join them: accelerate merge-weights {quote(str(folder / name))} OUT",
        )
    own = re.fullmatch(r"global_step\d+", folder.name) and _matching(there, ("*_states.pt",))
    if own or _matching(there, ("global_step*", "zero_to_fp32.py", "zero_pp_rank_*", "*optim_states.pt")):
        above = folder.parent if own else folder
        script = above / "zero_to_fp32.py"
        run = quote(str(script)) if script.is_file() else "-m deepspeed.utils.zero_to_fp32"
        yield (
            "a checkpoint of DeepSpeed ZeRO, in shards",
            f"Join them: python {run} {quote(str(above))} OUT",
        )
    if _matching(there, ("latest_checkpointed_iteration.txt", "iter_*", "mp_rank_*")):
        yield (
            "a checkpoint of Megatron, in shards",
            "Convert it: python tools/checkpoint/convert.py (Megatron-LM), or megatron.bridge",
        )
    yield from _of_hub(folder, there)
    steps = sorted(there, key=lambda name: int(match[1]) if (match := _STEP.fullmatch(name)) else -1)
    if steps and _STEP.fullmatch(steps[-1]):
        yield (
            "a trainer's output folder: its checkpoints are in folders of their own",
            f"Name one, such as the last: {folder / steps[-1]}",
        )


def _of_hub(folder: Path, there: list[str]) -> Iterator[tuple[str, str]]:
    """Yield what a folder of the hub's cache is."""
    cached = [name for name in there if name.startswith("models--")]
    if cached:
        yield "the hub's cache", f"Name a model by its id, such as {_hub_id(cached[0])}"
    above = next((one for one in (folder, folder.parent) if one.name.startswith("models--")), None)
    if above is not None and not (folder / "config.json").exists():
        snapshots = sorted(path for path in (above / "snapshots").glob("*") if path.is_dir())
        which = f", or its snapshot: {snapshots[-1]}" if snapshots else ""
        yield "a repository in the hub's cache", f"Name it by its id, {_hub_id(above.name)}{which}"


def _hub_id(name: str) -> str:
    return plain(name.removeprefix("models--").replace("--", "/"), _LONGEST)


def _holds_weights(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        return bool(weights_among(file.name for file in path.iterdir()))
    except OSError:
        return False


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
