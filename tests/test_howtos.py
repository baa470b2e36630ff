"""The code of the how-tos runs, block after block."""

import re
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs
HOWTOS = Path(__file__).parents[1] / "docs" / "howto"


@pytest.mark.parametrize("name", ["doors", "edit-checkpoints", "interventions", "prompts"])
def test_the_code_of_a_howto_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would type it, in one session."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (HOWTOS / f"{name}.md").read_text("utf-8"), re.S)
    session: dict[str, object] = {}

    assert len(blocks) > 1
    with warnings.catch_warnings(action="ignore"):
        for block in blocks:
            exec(block, session)
