"""A task shows its first examples in a notebook: escaped words, small pictures, names of other media."""

import base64
import io
import re
from pathlib import Path

from PIL import Image

import affectlens as al


def test_the_first_examples_are_shown_with_their_pictures(tmp_path: Path) -> None:
    """Small copies; a file that can't be read is named with the reason."""
    Image.new("RGB", (400, 200), "red").save(tmp_path / "red.png")
    examples = tuple(
        al.Example(str(number), label, text="<b>so</b> sad", images=(str(tmp_path / file),), audio=audio)
        for number, (label, file, audio) in enumerate(
            [("happy", "red.png", ()), ("sad", "none.png", ("/far/away/cry.wav",))] * 5
        )
    )
    shown = al.Task("t", examples, ("happy", "sad"), prompt="{text} <i>I feel</i>")._repr_html_()
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", shown)

    assert len(pictures) == 3
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (96, 48)
    assert shown.count("&lt;b&gt;so&lt;/b&gt; sad") == 6
    assert "[sound: cry.wav]" in shown
    assert "none.png" in shown
    assert "4 more examples" in shown
    assert "{text} &lt;i&gt;I feel" in shown
    assert str(tmp_path) not in re.sub(r"\[[^\]]*none.png[^\]]*\]", "", shown)


def test_a_chat_is_shown_by_its_turns() -> None:
    """With placeholders for media, and without the answer that closes it."""
    chat = (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]},
        {"role": "assistant", "content": "happy"},
    )
    examples = tuple(al.Example(str(n), label, messages=chat) for n, label in enumerate(("happy", "sad")))
    shown = al.Task("t", examples, ("happy", "sad"))._repr_html_()

    assert "system: be brief<br>user: [image] which?" in shown
    assert "assistant" not in shown
