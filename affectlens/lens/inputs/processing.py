"""Load the processor of a model from a folder of copies, with what is installed.

transformers reads films with torchvision. Where that is missing it gives up the whole processor, pictures
and sounds too; then the parts are loaded one by one, and a stand-in takes the place of the one for films.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from affectlens.lens.telling import broken, line


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

    from affectlens.lens.inputs.filming import Frames, accepted, settings_in

    if importlib.util.find_spec("torchvision") is not None:
        raise ImportError("torchvision is here")
    kind = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(room, **options))]
    loaders = {
        "tokenizer": AutoTokenizer.from_pretrained,
        "image_processor": AutoImageProcessor.from_pretrained,
        "feature_extractor": AutoFeatureExtractor.from_pretrained,
        "video_processor": lambda *_, **__: Frames(kind.__name__, settings_in(room)),
    }
    parts = [loaders[part](room, **options) for part in kind.get_attributes()]
    said, _ = kind.get_processor_dict(room, local_files_only=True)
    with accepted():
        return kind.from_args_and_dict(parts, said)
