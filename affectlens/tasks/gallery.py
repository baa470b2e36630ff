"""Show a task in a notebook: its first examples, with their pictures."""

import base64
import io
from collections.abc import Sequence
from pathlib import PurePath

from PIL import Image

from affectlens import html
from affectlens.errors import AffectlensError
from affectlens.tasks.examples import Example
from affectlens.tasks.pictures import open_picture

EXAMPLES = 6
_PIXELS = 96  # the longer side of a picture
_LONGEST = 300  # characters of a text


def gallery(title: str, examples: Sequence[Example], *, prompt: str) -> str:
    """Return HTML with a title and the first examples: id, label, what is shown, and the prompt once."""
    rows = "".join(map(_row, examples[:EXAMPLES]))
    head = "".join(f"<th>{name}</th>" for name in ("id", "label", "shown"))
    left = len(examples) - EXAMPLES
    more = f"<p>… {left:,} more examples</p>" if left > 0 else ""
    asked = f"<p>prompt: {html.text(prompt)}</p>"
    caption = f"<caption>{html.text(title)}</caption>"
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="{html.NO_FORMULAS}">{table}{more}{asked}</div>'


def _row(example: Example) -> str:
    files = [("sound", file) for file in example.audio]
    files += [("film", film if isinstance(film, str) else f"{len(film)} frames") for film in example.video]
    shown = [
        *map(_picture, example.images),
        *(html.text(f"[{kind}: {PurePath(file).name}]") for kind, file in files),
        *(html.text(words[:_LONGEST] + "…" * (len(words) > _LONGEST)) for words in _words(example)),
    ]
    cells = (html.escape(example.id), html.escape(example.label), "<br>".join(shown))
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _words(example: Example) -> list[str]:
    if not example.messages:
        return [example.text] if example.text else []
    lines = []
    for message in example.chat():
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        words = " ".join(str(part.get("text", f"[{part.get('type')}]")) for part in parts)
        lines.append(f"{message['role']}: {words}")
    return lines


def _picture(file: str | Image.Image) -> str:
    try:
        picture = open_picture(file)
    except AffectlensError as error:
        return html.text(f"[{error}]")
    picture.thumbnail((_PIXELS, _PIXELS))
    picture.save(stream := io.BytesIO(), "PNG")
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    name = html.escape(PurePath(file).name if isinstance(file, str) else "picture")
    return f'<img src="data:image/png;base64,{data}" alt="{name}" title="{name}">'
