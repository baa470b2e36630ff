"""Media reach the model through its processor, at the positions that `spans` reports, or raise an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from torch import Tensor, nn

import affectlens as al
from affectlens.errors import LensError, TaskError
from affectlens.lens.inputs import processors
from affectlens.lens.inputs.placeholders import spans
from affectlens.lens.live import config_of
from tests.lens.families import AUDIO, IMAGE, VIDEO, base
from tests.lens.processors import processor, tokenizer
from tests.numbers import differ

MEDIA = (
    ("llava", "image"), ("llava_onevision", "image"), ("llava_onevision", "video"), ("qwen2_vl", "image"),
    ("qwen2_vl", "video"), ("qwen2_5_vl", "image"), ("qwen2_5_vl", "video"), ("gemma3", "image"),
    ("idefics3", "image"), ("smolvlm", "image"), ("internvl", "image"), ("internvl", "video"),
    ("qwen2_audio", "audio"), ("qwen2_5_omni", "audio"), ("qwen2_5_omni", "image"), ("qwen2_5_omni", "video"),
)  # fmt: skip
TOKENS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
Show = Callable[..., al.Example]


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Show:
    """Make the n-th example with one medium of a kind."""
    folder = tmp_path_factory.mktemp("media")
    made = np.random.default_rng(0)
    for n in range(4):
        Image.fromarray(made.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        noise = made.normal(size=8000 + 1000 * n) * 3000
        wavfile.write(folder / f"{n}.wav", 16_000, noise.astype(np.int16))

    def shown(medium: str, n: int = 0, text: str = "well?", **more: Any) -> al.Example:
        pictures = tuple(str(folder / f"{k % 4}.png") for k in (n, n + 1, n + 2))
        given = {"image": pictures[:1], "audio": (str(folder / f"{n}.wav"),), "video": (pictures,)}
        name = "images" if medium == "image" else medium
        return al.Example(f"{medium}{n}", "happy", text, **{name: given[medium], **more})

    return shown


def lens_of(family: str, *, template: bool = True) -> al.Lens:
    return al.Lens(base(family), processor(family, template=template))


@pytest.mark.parametrize("template", [True, False], ids=["chat", "bare"])
@pytest.mark.parametrize(("family", "medium"), MEDIA)
def test_media_reach_the_model(family: str, medium: str, template: bool, show: Show) -> None:
    """Different pictures, sounds and films give different logits, with and without a chat template."""
    lens = lens_of(family, template=template)
    one, two = (lens.logits(show(medium, n)) for n in (0, 1))

    assert not torch.allclose(one, two, atol=1e-3)
    assert torch.equal(one, lens.logits(show(medium, 0)))


@pytest.mark.parametrize(("family", "medium"), MEDIA)
def test_an_example_is_the_same_alone_and_beside_another(family: str, medium: str, show: Show) -> None:
    """Neither padding nor a batch changes an answer."""
    lens = lens_of(family)
    examples = show(medium, 0), show(medium, 1, text="what is it that you feel?")
    alone = torch.cat([lens.logits(example) for example in examples])

    torch.testing.assert_close(alone, lens.logits(*examples), atol=1e-4, rtol=1e-4)
    answers = [lens.generate(example, max_new_tokens=3)[0] for example in examples]
    assert answers == lens.generate(*examples, max_new_tokens=3)


def entering(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the input of the first layer of the language model."""
    layer = next(part for part in model.modules() if type(part).__name__.endswith("DecoderLayer"))
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.inference_mode():
        model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("family", "medium"), MEDIA)
def test_spans_are_where_the_model_puts_its_embeddings(family: str, medium: str, show: Show) -> None:
    """A span is exactly the positions whose input is not the embedding of their token."""
    lens = lens_of(family)
    batch = lens.prepare(show(medium, 0), show(medium, 1, text="what is it?"))
    found = spans(batch["input_ids"], batch["attention_mask"], config=config_of(lens.model))
    with torch.inference_mode():
        words = lens.model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    put = (words != entering(lens.model, batch)).any(-1)

    where = "image" if family == "internvl" else medium  # InternVL turns films into pictures
    assert put.any()
    assert torch.equal(put, found[where])
    assert torch.equal(batch["attention_mask"].bool(), found["text"] | found[where])


@pytest.mark.parametrize(("family", "medium"), MEDIA)
def test_places_and_media_have_to_agree(family: str, medium: str, show: Show) -> None:
    """A placeholder without a medium, a medium without a placeholder, or too many of either is an error."""
    for template in (True, False):
        lens = lens_of(family, template=template)
        token = getattr(lens.processor, f"{medium}_token")
        bad = [al.Example("bare", "x", f"look: {token}"), show(medium, 0, text=f"look: {token}")]
        silent = ({"role": "user", "content": "hm"},)
        twice = ({"role": "user", "content": [{"type": medium}, {"type": medium}]},)
        bad += [show(medium, 0, messages=chat) for chat in (silent, twice) if template]
        for example in bad:
            with pytest.raises(LensError, match=r"placeholders for (pictures|sounds|films)") as caught:
                lens.prepare(example)
            assert str(caught.value).isprintable()


def test_a_chat_says_where_media_stand(show: Show) -> None:
    """Media stand between the texts of a message, in the order of its parts."""
    lens = lens_of("qwen2_5_omni")
    parts = [
        {"type": "text", "text": "a"},
        {"type": "audio"},
        {"type": "image"},
        {"type": "text", "text": "b"},
    ]
    example = show("audio", 0, images=show("image").images, messages=({"role": "user", "content": parts},))
    batch = lens.prepare(example)
    found = spans(batch["input_ids"], config=config_of(lens.model))
    first = {medium: int(mask.float().argmax()) for medium, mask in found.items() if mask.any()}

    assert first["text"] < first["audio"] < first["image"]


def test_a_tokenizer_takes_no_media(show: Show) -> None:
    """A tokenizer alone refuses a picture, and a placeholder that the model would take for a picture."""
    lens = al.Lens(base("llava"), tokenizer())
    with pytest.raises(LensError, match=r"example 'image0' has a picture, but .* takes text only"):
        lens.prepare(show("image"))
    with pytest.raises(
        LensError, match="its text has placeholders for pictures, but the example has no pictures"
    ):
        lens.prepare(al.Example("1", "x", "what is <image>?"))


def test_media_that_a_model_does_not_take_are_told(show: Show) -> None:
    """The error says which media the processor takes."""
    with pytest.raises(LensError, match="has a sound, but LlavaProcessor takes text and pictures"):
        lens_of("llava").prepare(show("audio"))
    with pytest.raises(LensError, match="has a film, but Qwen2AudioProcessor takes text and sounds"):
        lens_of("qwen2_audio").prepare(show("video"))


def test_the_channels_of_a_sound_are_one(tmp_path: Path) -> None:
    """A sound with two equal channels has the features of one channel."""
    mono = (np.random.default_rng(1).normal(size=6000) * 3000).astype(np.int16)
    wavfile.write(tmp_path / "one.wav", 16_000, mono)
    wavfile.write(tmp_path / "two.wav", 16_000, np.stack([mono, mono], axis=1))
    lens = lens_of("qwen2_audio")
    one, two = (
        lens.prepare(al.Example("1", "x", audio=(str(tmp_path / f"{n}.wav"),))) for n in ("one", "two")
    )

    assert torch.equal(one["input_features"], two["input_features"])


def test_sounds_at_other_rates_are_heard_alike(tmp_path: Path) -> None:
    """A tone recorded at 48 kHz has the features that it has at 16 kHz."""
    for rate in (16_000, 48_000):
        tone = np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)
        wavfile.write(tmp_path / f"{rate}.wav", rate, (tone * 2**14).astype(np.int16))
    lens = lens_of("qwen2_5_omni")
    batches = [
        lens.prepare(al.Example("1", "x", audio=(str(tmp_path / f"{rate}.wav"),)))
        for rate in (16_000, 48_000)
    ]

    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    torch.testing.assert_close(batches[0]["input_features"], batches[1]["input_features"], atol=0.1, rtol=0.0)


def test_a_sound_longer_than_is_heard_is_told(tmp_path: Path) -> None:
    """A sound longer than the model takes is an error: its end would be cut silently."""
    wavfile.write(tmp_path / "long.wav", 16_000, np.ones(20_000, np.int16))
    with pytest.raises(LensError, match=r"a sound of 1\.2 s, but the model takes 1 s at most; cut it"):
        lens_of("qwen2_audio").prepare(al.Example("1", "x", audio=(str(tmp_path / "long.wav"),)))


@pytest.mark.parametrize("medium", ["image", "audio", "video"])
def test_broken_media_are_told(medium: str, tmp_path: Path) -> None:
    """The error names the file."""
    (tmp_path / "broken").write_bytes(b"RIFF\0\0\0\0WAVEjunk")
    name = "images" if medium == "image" else medium
    example = al.Example("1", "x", **{name: (str(tmp_path / "broken"),)})  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"broken': this (picture|sound|film) can't be read"):
        lens_of("qwen2_5_omni").prepare(example)


def test_films_go_by_their_own_clocks(tmp_path: Path) -> None:
    """Slower films have more seconds per step, each film by its own animation."""
    made = np.random.default_rng(0)
    frames = [Image.fromarray(made.integers(0, 255, (56, 56, 3), dtype=np.uint8)) for _ in range(4)]
    for wait in (250, 1000):  # milliseconds
        frames[0].save(tmp_path / f"{wait}.png", save_all=True, append_images=frames[1:], duration=wait)
    fast, slow = (al.Example(str(w), "x", "hm", video=(str(tmp_path / f"{w}.png"),)) for w in (250, 1000))
    for family, name in (("qwen2_5_vl", "second_per_grid_ts"), ("qwen2_5_omni", "video_second_per_grid")):
        lens = lens_of(family)

        assert [0.5, 2.0] == lens.prepare(fast, slow)[name].tolist()
        assert differ(lens.logits(fast), lens.logits(slow))


@pytest.mark.parametrize(("family", "medium"), MEDIA)
def test_a_batch_may_hold_texts_too(family: str, medium: str, show: Show) -> None:
    """An example without media has the same logits alone and beside one with media."""
    lens = lens_of(family)
    text = al.Example("text", "x", "and what do you feel?")
    alone = torch.cat([lens.logits(show(medium)), lens.logits(text)])

    torch.testing.assert_close(alone, lens.logits(show(medium), text), atol=1e-4, rtol=1e-4)


def test_films_without_torchvision_are_told(show: Show) -> None:
    """Films of an unknown family raise an error that names torchvision; its pictures work."""
    made = lens_of("qwen2_vl").processor
    films = made.video_processor
    made.video_processor = processors.Frames("Glm4vProcessor")
    try:
        with pytest.raises(LensError, match="not installed: pip install torchvision"):
            lens_of("qwen2_vl").prepare(show("video"))
        lens_of("qwen2_vl").prepare(show("image"))
    finally:
        made.video_processor = films


def test_frames_are_put_together_as_pictures_are() -> None:
    """A film of one frame has the patches of that picture; a film of two frames has the patches of both."""
    frames = np.random.default_rng(0).integers(0, 255, (2, 56, 56, 3), dtype=np.uint8)
    pictures = processor("qwen2_vl").image_processor
    stand = processor("qwen2_vl").video_processor
    still = stand(frames[:1])["pixel_values_videos"]
    both = stand(frames)["pixel_values_videos"].reshape(-1, 3, 2, 14 * 14)

    assert torch.equal(pictures(Image.fromarray(frames[0]), return_tensors="pt")["pixel_values"], still)
    for n in (0, 1):
        alone = pictures(Image.fromarray(frames[n]), return_tensors="pt")["pixel_values"]
        assert torch.equal(alone.reshape(-1, 3, 2, 14 * 14)[:, :, n], both[:, :, n])


def test_a_processor_is_loaded_without_torchvision(tmp_path: Path, show: Show) -> None:
    """A processor loaded part by part gives the logits of the saved one, for pictures and films."""
    saved = processor("qwen2_5_vl")
    base("qwen2_5_vl").save_pretrained(tmp_path)
    saved.save_pretrained(tmp_path)
    lens = al.load(tmp_path)

    assert type(saved) is type(lens.processor)
    for medium in ("image", "video"):
        assert torch.equal(lens_of("qwen2_5_vl").logits(show(medium)), lens.logits(show(medium)))


def test_sounds_alone_are_heard(show: Show) -> None:
    """A model that takes sounds alone answers from its decoder's first token, and refuses a text."""
    lens = lens_of("whisper", template=False)
    first = torch.tensor([[lens.model.config.decoder_start_token_id]])
    one, two = (lens.prepare(show("audio", n, text="")) for n in (0, 1))
    with torch.inference_mode():
        expected = lens.model(input_features=one["input_features"], decoder_input_ids=first).logits[:, -1]

    assert torch.equal(expected, lens.logits(show("audio", 0, text="")))
    assert differ(expected, lens.run(two)[:, -1])
    assert 1 == len(lens.generate(show("audio", 0, text=""), max_new_tokens=2))
    with pytest.raises(LensError, match="takes sounds without text, but the text is 'well"):
        lens.prepare(show("audio"))
