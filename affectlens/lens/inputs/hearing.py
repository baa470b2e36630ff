"""Sounds for a processor: at the rate its features are made at, and no longer than it hears."""

from collections.abc import Sequence
from typing import Any

from affectlens.errors import LensError, quoted
from affectlens.tasks import Example
from affectlens.tasks.sounds import open_sound

# These make features of so many samples, and drop without a word what comes after. Others take windows.
_CUT_OFF = ("Qwen2AudioProcessor", "Qwen2_5OmniProcessor", "Qwen3OmniMoeProcessor", "WhisperProcessor")


def hear(processor: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """The sounds of examples, one after the other, and their rate. Raises `LensError` and `TaskError`."""
    extractor = getattr(processor, "audio_processor", None) or processor.feature_extractor
    rate = int(extractor.sampling_rate)
    most = extractor.n_samples if type(processor).__name__ in _CUT_OFF else None
    sounds = []
    for example in examples:
        for source in example.audio:
            sounds.append(open_sound(source, rate))
            if most is not None and len(sounds[-1]) > most:
                raise LensError(
                    f"example {quoted(example.id)}: a sound of {len(sounds[-1]) / rate:.1f} s, and the model "
                    f"hears {most / rate:g} s; cut it"
                )
    return {"audio": sounds, "sampling_rate": rate}
