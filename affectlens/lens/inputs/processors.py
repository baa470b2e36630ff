"""Frames of films for a model, with Pillow: what transformers' own video processors need torchvision for.

Each frame goes through a picture processor with the settings of the video processor, and the frames are put
together as the family's own would. Against transformers' own with torchvision, resized frames were seen to
differ by one grey level of 256 at most, as they do between transformers' two picture processors.
"""

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from einops import rearrange
from jaxtyping import Float
from transformers import BatchFeature, processing_utils
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import make_batched_metadata, make_batched_videos

from affectlens.errors import LensError
from affectlens.lens.running import broken, line

_FILES = ("video_preprocessor_config.json", "processor_config.json", "preprocessor_config.json")


def load_processor(room: Path, *, name: str, code: bool) -> tuple[Any, str]:
    """The processor or tokenizer, or None; and why the files of one can't be read, which is warned of too."""
    from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase

    why = ""
    for way in (AutoProcessor.from_pretrained, _in_parts, AutoTokenizer.from_pretrained):
        try:
            found = way(room, trust_remote_code=code, local_files_only=True)
        except BaseException as error:
            if not broken(error):
                raise
            why = why or line(error).replace(str(room), room.name)
            continue
        if isinstance(getattr(found, "tokenizer", found), PreTrainedTokenizerBase):
            # A tokenizer alone, where there should be more: why is said when an example has media.
            return found, why if way == AutoTokenizer.from_pretrained else ""
    if any("token" in file.name or "vocab" in file.name for file in room.iterdir()):
        why = f"{name}: its tokenizer can't be read ({why})"
        warnings.warn(f"{why}, so it reads no examples", stacklevel=3)
        return None, why
    return None, ""


def _in_parts(room: Path, **options: Any) -> Any:
    """A processor without torchvision; raises what breaks, and where there is no need of this."""
    from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if importlib.util.find_spec("torchvision") is not None:
        raise ImportError("torchvision is here")
    kind = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(room, **options))]
    loaders = {
        "tokenizer": AutoTokenizer.from_pretrained,
        "image_processor": AutoImageProcessor.from_pretrained,
        "feature_extractor": AutoFeatureExtractor.from_pretrained,
        "video_processor": lambda *_, **__: Frames(kind.__name__, _video_settings(room)),
    }
    parts = [loaders[part](room, **options) for part in kind.get_attributes()]
    said, _ = kind.get_processor_dict(room, local_files_only=True)
    with accepted():
        return kind.from_args_and_dict(parts, said)


def _video_settings(folder: Path) -> dict[str, Any]:
    """What the files of a model say of its video processor."""
    for name in _FILES:
        if (folder / name).exists():
            found = json.loads((folder / name).read_bytes())
            found = found.get("video_processor") if name == "processor_config.json" else found
            if isinstance(found, dict):
                return found
    return {}


@contextmanager
def accepted() -> Iterator[None]:
    """Let processors that are made in the block take stand-ins.

    transformers looks up what it takes among its public names, and without torchvision that one is not there.
    """
    names, name = processing_utils.transformers_module, VideoProcessorMixin.__name__
    missing = name not in vars(names)
    if missing:
        setattr(names, name, VideoProcessorMixin)
    try:
        yield
    finally:
        if missing:
            delattr(names, name)


# A processor takes none that is not of this kind; all that it calls is below.
class Frames(VideoProcessorMixin):  # type: ignore[misc]
    """Stand in for the video processor of a family where torchvision is missing.

    `processor` is the name of the family's processor class, `settings` those of its video processor.
    Films of a family that is not known here raise `LensError` when they come.
    """

    valid_kwargs = VideosKwargs

    def __init__(self, processor: str, settings: Mapping[str, Any] | None = None) -> None:
        unknown = _Family(None, "CLIPImageProcessorPil", {}, processor.replace("Processor", "VideoProcessor"))
        self.way = _FAMILIES.get(processor, unknown)
        self.model_input_names = ["pixel_values_videos"]
        self.settings = {**self.way.settings, **(settings or {})}
        known = getattr(transformers, self.way.pictures)
        taken = known.valid_kwargs.__annotations__
        self.images = known(**{k: v for k, v in self.settings.items() if k in taken and v is not None})
        self.size = self.images.size
        self.merge_size = getattr(self.images, "merge_size", None)
        self.temporal_patch_size = getattr(self.images, "temporal_patch_size", None)
        self.patch_size = getattr(self.images, "patch_size", None)

    def to_dict(self) -> dict[str, Any]:
        """The settings, as those of the video processor that is stood in for."""
        return {**self.settings, "video_processor_type": self.way.kind}

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """The pixels of films, each an array of frames, or a list of pictures."""
        if self.way.put is None:
            raise LensError(
                "transformers reads the films of this model with torchvision, which is not installed: "
                "pip install torchvision"
            )
        films = make_batched_videos(videos)
        settings = {"size": kwargs["size"]} if kwargs.get("size") else {}
        parts = [self.way.put(np.asarray(film), self.images, **settings) for film in films]
        same = len({part["pixel_values_videos"].shape[1:] for part in parts}) == 1
        if not same:
            raise LensError(
                "films that are read together need as many frames as each other, of one size; run them one "
                "by one (batch_size=1)"
            )
        data = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        found = BatchFeature(data=data)
        if kwargs.get("return_metadata"):
            found["video_metadata"] = make_batched_metadata(
                films, video_metadata=kwargs.get("video_metadata")
            )
        return found


@dataclass(frozen=True)
class _Family:
    """Hold how a family's films are put together: by what, from which pictures, with which settings."""

    put: Callable[..., dict[str, Any]] | None
    pictures: str
    settings: Mapping[str, Any]
    kind: str  # the video processor of transformers that it stands in for


def _patched(film: np.ndarray, images: Any, **settings: Any) -> dict[str, Any]:
    """Frames of Qwen's models: patches in the order of pictures, each of several frames in turn."""
    found = images.preprocess(list(film), **settings, return_tensors="np")
    repeats = images.temporal_patch_size
    grids = found["image_grid_thw"]
    # A picture stands for all frames of a patch; one of them is the frame itself.
    frames = rearrange(
        found["pixel_values"], "(f n) (c s p) -> f n c s p", f=len(film), s=repeats, p=images.patch_size**2
    )[:, :, :, 0]
    missing = -len(film) % repeats
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    values = rearrange(frames, "(t s) n c p -> (t n) (c s p)", s=repeats)
    grid = [len(frames) // repeats, *grids[0, 1:].tolist()]
    return {"pixel_values_videos": torch.from_numpy(values), "video_grid_thw": torch.tensor([grid])}


def _stacked(film: np.ndarray, images: Any, **settings: Any) -> dict[str, Any]:
    """Frames of LLaVA's and InternVL's models: a film is its frames, all pictures of one size."""
    values: Float[np.ndarray, "frame channel height width"]
    values = images.preprocess(list(film), **settings, return_tensors="np")["pixel_values"]
    return {"pixel_values_videos": torch.from_numpy(np.asarray(values))[None]}


_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


_PLAIN = {"resample": 3, "do_center_crop": False, "size": {"height": 384, "width": 384}, **_CLIP}


_PATCHED = {
    "resample": 3, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, **_CLIP,
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
}  # fmt: skip


_QWEN = _Family(_patched, "Qwen2VLImageProcessorPil", _PATCHED, "Qwen2VLVideoProcessor")


_FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys(
        ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen2_5OmniProcessor", "Qwen3OmniMoeProcessor"), _QWEN
    ),
    "LlavaOnevisionProcessor": _Family(
        _stacked, "CLIPImageProcessorPil", _PLAIN, "LlavaOnevisionVideoProcessor"
    ),
    "InternVLProcessor": _Family(_stacked, "CLIPImageProcessorPil", _PLAIN, "InternVLVideoProcessor"),
}
