"""The README's numbers are those of the demo, and its code runs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import affectlens as al
from affectlens.cli.text import tell_drift, tell_effects
from affectlens.studying import roles

pytestmark = pytest.mark.docs
README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
AFFECTIVE = ("faces-unseen", "sentences")
CONTROL = ("turned-unseen", "length", "kaomoji-width")
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*")


def stated() -> list[str]:
    """The lines of `make demo` that the README shows."""
    block = README.split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    return [line.rstrip() for line in block.splitlines() if line.strip() and not line.startswith("```")]


@pytest.fixture(scope="module")
def effects(lens: al.Lens, demo: al.Demo) -> al.Effects:
    """What the demo measures on the affective tasks that the README speaks of."""
    actions = ("transplant", "revert", "zero")
    return swept(lens, demo, AFFECTIVE, groups=roles(demo.base.sites), actions=actions)


@pytest.fixture(scope="module")
def owned(lens: al.Lens, demo: al.Demo) -> al.Effects:
    """What the demo measures on the control's own tasks, of the groups that the README speaks of."""
    groups = roles(demo.base.sites)
    blocks = {name: groups[name] for name in ("attention", "mlp")}
    return swept(lens, demo, CONTROL, groups=blocks, actions=("transplant",))


def swept(
    lens: al.Lens,
    demo: al.Demo,
    names: Sequence[str],
    *,
    groups: Mapping[str, al.Sites],
    actions: tuple[str, ...],
) -> al.Effects:
    """Sweep as the demo does, with fewer tasks, groups and actions."""
    grid = al.Grid(demo.base.sites, groups, actions, donor=demo.tuned, control=demo.control)
    return al.sweep(lens, grid, [demo.task(name) for name in names], progress=False)


@pytest.fixture(scope="module")
def lines(effects: al.Effects, demo: al.Demo) -> list[str]:
    """What the demo prints of the drift and of those tasks."""
    drift = al.diff(demo.base, demo.tuned, control=demo.control, progress=False)
    return [*tell_drift(drift), *tell_effects(effects)]


def test_the_stated_figures_are_those_of_the_demo(lines: list[str]) -> None:
    """Every line of the block is printed by the demo: the same words, and numbers within the tolerance."""
    for line in stated():
        assert any(close(line, other) for other in lines), line


def test_the_prose_states_the_figures_of_the_demo(effects: al.Effects, owned: al.Effects) -> None:
    """Every number of the text under the block is made here from the tables."""
    faces, sentences = (score(effects, task) for task in AFFECTIVE)
    gate, value, attention, mlp = (
        [share(effects, name, task) for task in AFFECTIVE]
        for name in ("gate_proj", "v_proj", "attention", "mlp")
    )
    ranks = effects.ranks().set_index(["action", "sites", "task"])["at_least"]
    null = [ranks["transplant", "gate_proj", task] for task in AFFECTIVE]
    own = {
        name: [share(owned, name, task, control=True) for task in CONTROL] for name in ("attention", "mlp")
    }
    said = " ".join(README.replace("−", "-").split())

    for words in (
        f"names the emotion of {faces} %",
        f"the valence of {sentences} %",
        f"`gate_proj` brings {gate[0]} % of the gain on faces and {gate[1]} % on sentences",
        f"`v_proj` {value[0]} % and {value[1]} %",
        f"{attention[0]} % and {attention[1]} % (MLP: {mlp[0]} % and {mlp[1]} %",
        f"{null[0]} and {null[1]} do as much",
        "attention brings {}, {} and {} % of its gain".format(*own["attention"]),
        "its MLP {}, {} and {} %".format(*own["mlp"]),
    ):
        assert words in said


def test_the_block_is_not_empty() -> None:
    """There are figures to check."""
    assert 15 <= len(stated())


def test_the_python_of_the_readme_runs(
    demo: al.Demo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As it stands, here on the first examples of each task."""
    few = demo._replace(tasks=tuple(task.head(6) for task in demo.tasks))
    monkeypatch.setattr(al, "load_demo", lambda: few)
    monkeypatch.chdir(tmp_path)

    exec(README.split("```python\n")[1].split("```")[0], {})

    assert (tmp_path / "report.html").is_file()


def close(one: str, two: str) -> bool:
    """Whether two lines say the same, but for spaces and the last digits: one unit of a share or a count."""
    words = [NUMBER.sub("#", " ".join(line.split())) for line in (one, two)]
    tokens = zip(*(NUMBER.findall(line) for line in (one, two)), strict=False)
    return words[0] == words[1] and all(near(stated, found) for stated, found in tokens)


def near(stated: str, found: str) -> bool:
    """Within two units of the last place stated: processors differ in the last bits of a sum."""
    x, y = (float(token.replace(",", "")) for token in (stated, found))
    places = len(stated.partition(".")[2])
    return abs(x - y) <= (2.001 * 10**-places if places else max(1.0, 0.001 * abs(x)))


def score(effects: al.Effects, task: str) -> str:
    """The tuned model's accuracy as the README puts it: '71 % (62 to 79; base 13 %, majority 20'."""
    row = effects.where(kind="reference", task=task, metric="accuracy").frame.iloc[0]
    majority = effects.origin["tasks"][task]["majority"]
    value, low, high, base, most = (
        round(100 * x) for x in (row["value"], row["low"], row["high"], row["baseline"], majority)
    )
    return f"{value} % ({low} to {high}; base {base} %, majority {most}"


def share(effects: al.Effects, name: str, task: str, *, control: bool = False) -> int:
    """The share of the gain that a group brings alone, of the control's own gain if asked for."""
    rows = effects.where(action="transplant", task=task, metric="margin")
    if not control:
        return round(100 * rows.where(sites=name, kind="effect").frame["recovered"].iloc[0])
    part, whole = (rows.where(sites=s, kind="control-tuning").frame["effect"].iloc[0] for s in (name, "all"))
    return round(100 * part / whole)
