"""Films for a processor: the frames that were taken, and when they are shown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from affectlens.tasks import Example
from affectlens.tasks.films import open_film

_FPS = 2.0  # of frames without a clock, which is what Qwen's models take a second of film to have


def watch(examples: Sequence[Example]) -> dict[str, Any]:
    """The frames of films, one film after the other, and their times. Raises `TaskError`."""
    from transformers.video_utils import VideoMetadata

    films = [open_film(source) for example in examples for source in example.video]
    times = [
        VideoMetadata(
            total_num_frames=len(film.frames),
            fps=film.fps or _FPS,
            duration=len(film.frames) / (film.fps or _FPS),
            frames_indices=list(range(len(film.frames))),
        )
        for film in films
    ]
    # Frames were taken already: processors would take some of those again.
    settings = {"do_sample_frames": False, "video_metadata": times}
    return {
        "videos": [np.stack([np.asarray(frame) for frame in film.frames]) for film in films],
        "videos_kwargs": settings,
    }


def clocked(batch: Mapping[str, Tensor], media: Mapping[str, Any], *, processor: Any) -> dict[str, Tensor]:
    """A batch in which each film goes by its own clock, where a processor gave one to all of them."""
    found = dict(batch)
    if "video_second_per_grid" in found:
        steps = processor.video_processor.temporal_patch_size
        times = media["videos_kwargs"]["video_metadata"]
        found["video_second_per_grid"] = torch.tensor([steps / time.fps for time in times])
    return found
