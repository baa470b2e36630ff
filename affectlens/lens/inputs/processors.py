"""Load a model's processor, and process films without torchvision.

transformers needs torchvision for its video processors. The stand-in here passes each frame through the
family's picture processor, which uses Pillow, and arranges the frames as the family's video processor does.
Resized frames were measured to differ from transformers' own by at most one grey level of 256, as they do
between its two picture processors.
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
from affectlens.lens.failures import broken, line

_VIDEO_FILES = ("video_preprocessor_config.json", "processor_config.json", "preprocessor_config.json")


def load_processor(room: Path, *, name: str, code: bool) -> tuple[Any, str]:
    """Load the processor, else the tokenizer, else return None; and return the reason if part is missing.

    Warns where the files of a tokenizer are there but can't be read.
    """
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
            # If only the tokenizer could be loaded, the first error is repeated when an example has media.
            return found, why if way == AutoTokenizer.from_pretrained else ""
    if any("token" in file.name or "vocab" in file.name for file in room.iterdir()):
        why = f"{name}: its tokenizer can't be read ({why})"
        warnings.warn(f"{why}, so this lens can't read examples", stacklevel=3)
        return None, why
    return None, ""


def _in_parts(room: Path, **options: Any) -> Any:
    """Load a processor part by part, with the stand-in for its video processor.

    Raises whatever breaks, and `ImportError` where torchvision is installed.
    """
    from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if importlib.util.find_spec("torchvision") is not None:
        raise ImportError("torchvision is installed, so no stand-in is needed")
    kind = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(room, **options))]
    loaders = {
        "tokenizer": AutoTokenizer.from_pretrained,
        "image_processor": AutoImageProcessor.from_pretrained,
        "feature_extractor": AutoFeatureExtractor.from_pretrained,
        "video_processor": lambda *_, **__: Frames(kind.__name__, _video_settings(room)),
    }
    parts = [loaders[part](room, **options) for part in kind.get_attributes()]
    settings, _ = kind.get_processor_dict(room, local_files_only=True)
    with accepted():
        return kind.from_args_and_dict(parts, settings)


def _video_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a video processor from the files of a model."""
    for name in _VIDEO_FILES:
        if (folder / name).exists():
            found = json.loads((folder / name).read_bytes())
            found = found.get("video_processor") if name == "processor_config.json" else found
            if isinstance(found, dict):
                return found
    return {}


@contextmanager
def accepted() -> Iterator[None]:
    """Let processors made in the block accept a stand-in.

    transformers checks the class against a public name of its own, which is missing without torchvision.
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


# transformers accepts only this base class; every method that a processor calls is overridden below.
class Frames(VideoProcessorMixin):  # type: ignore[misc]
    """A stand-in for the video processor of a family, without torchvision.

    `processor` is the name of the family's processor class, `settings` are those of its video processor. A
    film of a family without a row in `_FAMILIES` raises `LensError` when it is processed.
    """

    valid_kwargs = VideosKwargs

    def __init__(self, processor: str, settings: Mapping[str, Any] | None = None) -> None:
        # Built for an unknown family too: its texts and pictures work.
        unknown = _Family(None, "CLIPImageProcessorPil", {}, processor.replace("Processor", "VideoProcessor"))
        self.family = _FAMILIES.get(processor, unknown)
        self.model_input_names = ["pixel_values_videos"]
        self.settings = {**self.family.settings, **(settings or {})}
        pictures = getattr(transformers, self.family.image_processor)
        taken = pictures.valid_kwargs.__annotations__
        self.images = pictures(**{k: v for k, v in self.settings.items() if k in taken and v is not None})
        # Processors read these to count the placeholders of a film.
        self.size = self.images.size
        self.merge_size = getattr(self.images, "merge_size", None)
        self.temporal_patch_size = getattr(self.images, "temporal_patch_size", None)
        self.patch_size = getattr(self.images, "patch_size", None)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings under the name of the family's own video processor, as a save writes them."""
        return {**self.settings, "video_processor_type": self.family.video_processor}

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Return the pixels of films, each an array of frames or a list of pictures."""
        if self.family.arrange is None:
            raise LensError(
                "films of this model need torchvision, which is not installed: pip install torchvision"
            )
        films = make_batched_videos(videos)
        settings = {"size": kwargs["size"]} if kwargs.get("size") else {}
        parts = [self.family.arrange(np.asarray(film), self.images, **settings) for film in films]
        same = len({part["pixel_values_videos"].shape[1:] for part in parts}) == 1
        if not same:
            raise LensError(
                "films in one batch need the same number of frames and the same size; run them one by one "
                "(batch_size=1)"
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
    """The way in which a family processes films."""

    arrange: Callable[..., dict[str, Any]] | None  # from frames to the model's arguments; None if unknown
    image_processor: str  # the class in transformers that resizes and normalises a frame
    settings: Mapping[str, Any]  # the defaults of its video processor
    video_processor: str  # the class in transformers that this stands in for


def _patched(film: np.ndarray, images: Any, **settings: Any) -> dict[str, Any]:
    """Arrange frames as Qwen's models take them: patches in picture order, each over several frames."""
    found = images.preprocess(list(film), **settings, return_tensors="np")
    repeats = images.temporal_patch_size
    grids = found["image_grid_thw"]
    # The picture processor repeats a picture over all frames of a patch; take each frame once.
    frames = rearrange(
        found["pixel_values"], "(f n) (c s p) -> f n c s p", f=len(film), s=repeats, p=images.patch_size**2
    )[:, :, :, 0]
    # The last frame is repeated until the patches are full, as the family's own processor does.
    missing = -len(film) % repeats
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    values = rearrange(frames, "(t s) n c p -> (t n) (c s p)", s=repeats)
    grid = [len(frames) // repeats, *grids[0, 1:].tolist()]
    return {"pixel_values_videos": torch.from_numpy(values), "video_grid_thw": torch.tensor([grid])}


def _stacked(film: np.ndarray, images: Any, **settings: Any) -> dict[str, Any]:
    """Stack frames as LLaVA's and InternVL's models take them: pictures of one size."""
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
