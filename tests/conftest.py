"""Check types while the tests run, and lend a warm process, saved models and the embedded pair."""

# ruff: noqa: E402

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from beartype import BeartypeConf
from beartype.claw import beartype_packages
from torch import nn

# Types are checked while the tests run in this process, from the first import of a module on. Shapes need
# jaxtyping, which takes ten times as long: `pyproject.toml` lists where there are any. Doors are left out, as
# their optional packages are imported for types alone.
CHECKED = ("effects", "interventions", "lens", "probes", "tasks", "writing")
beartype_packages(
    ["affectlens.drift.torch_engine", *(f"affectlens.{name}" for name in CHECKED)],
    conf=BeartypeConf(claw_skip_package_names=("affectlens.lens.doors",)),
)

import affectlens as al
from tests.hostile.running import Server
from tests.small_models import nudge, tiny

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests: side by side with others, one of them at the end would run alone."""
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("tutorials", "docs"))))


def pytest_collection_finish() -> None:
    """Keep the garbage collector off modules and tests: they live until the end, and some tests call it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Undo what the command line, run in this process, does about Ctrl-C: it would end all the tests."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
    signal.set_wakeup_fd(-1)


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a model into a new folder; `shards=True` spreads it over several files."""

    def saved(model: nn.Module, name: str, *, shards: bool = False) -> Path:
        folder = tmp_path_factory.mktemp(name) / name
        model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
        return folder

    return saved


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A warm process for the command line: torch takes seconds to import, and most runs a tenth of one."""
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="session")
def pair(save: Callable[..., Path]) -> tuple[Path, Path]:
    """A tiny LLaVA and the same after a nudge to its language layers' MLPs."""
    model = tiny("llava")
    base = save(model, "base")
    return base, save(nudge(model, "language_model.layers"), "tuned", shards=True)


@pytest.fixture(scope="session")
def demo() -> al.Demo:
    """The embedded pair."""
    return al.load_demo()


@pytest.fixture(scope="session")
def lens(demo: al.Demo) -> al.Lens:
    """The embedded base, live, in float32."""
    return al.load(demo.base, dtype="float32")
