"""The tutorials run from top to bottom, in a kernel of their own."""

import asyncio
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.tutorials
TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore")  # of the kernel's own machinery
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path: Path) -> None:
    """Every cell succeeds, and the notebook is stored without outputs."""
    notebook = nbformat.read(path, as_version=4)
    assert [] == [cell for cell in notebook.cells if cell.get("outputs")]

    asyncio.run(NotebookClient(notebook, timeout=300, kernel_name="python3").async_execute())

    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")
