"""The structure that the design promises: one-way imports, short files, plain names, a light import."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import affectlens

ROOT = Path(affectlens.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ORDER = (
    "lazy", "printable", "html", "errors", "files", "progress", "executing", "stats", "sites",
    "table_formats", "table_schema", "table_frames", "table", "checkpoints", "tasks", "demo", "drift",
    "probes", "lens",
    "interventions", "writing", "effects", "tuning", "credit", "views", "studying", "cli", "__main__",
)  # fmt: skip
HEAVY = ("torch", "transformers", "nnsight", "transformer_lens", "peft", "plotly", "pandas")

NO_VERBS = ("The", "What", "Whether", "Those", "Where", "Which", "How", "A", "An")
# What is allowed to be longer or take more arguments, and why.
LONG_SIGNATURES: dict[str, str] = {}


def test_layers_are_one_way() -> None:
    """A folder imports only from folders before it in the order."""
    wrong = [
        f"{file.relative_to(ROOT)} imports {other}"
        for file in FILES
        if (own := layer(file)) in ORDER
        for other in layers_imported(file)
        if ORDER.index(other) > ORDER.index(own)
    ]

    assert [] == wrong, "\n".join(wrong)


def test_every_module_has_its_place_in_the_order() -> None:
    """Every folder and file of the package is listed in the order."""
    assert set(ORDER) >= {layer(file) for file in FILES} - {"__init__"}


def test_there_is_no_import_cycle() -> None:
    """Modules can be read from the bottom up, counting imports for types and those inside functions."""
    graph = {module_name(file): set(modules_imported(file)) for file in FILES if file != ROOT / "__init__.py"}

    found = [" ↔ ".join(ring) for ring in rings(graph)]

    assert [] == found, "\n".join(found)


def test_the_search_for_cycles_finds_whole_ones() -> None:
    """Modules that reach each other are listed together, and no other with them."""
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a", "f"}, "g": set()}

    assert [["a", "b", "c"], ["d", "e"], ["f"]] == rings(graph)


def test_every_stated_shape_is_checked() -> None:
    """The tests run each module that annotates shapes under jaxtyping; numba's kernels would not compile."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))
    options = project["tool"]["pytest"]["ini_options"]["addopts"]
    (checked,) = (o.partition("=")[2].split(",") for o in options if o.startswith("--jaxtyping-packages"))
    stated = [
        module_name(file)
        for file in FILES
        if any(
            isinstance(node, ast.ImportFrom) and node.module == "jaxtyping" for node in ast.walk(tree(file))
        )
    ]

    assert [*stated, "beartype.beartype"] == checked


def test_there_is_no_star_import() -> None:
    """Every imported name shows where it comes from."""
    stars = [
        str(file)
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]

    assert [] == stars


def test_no_two_files_share_a_name() -> None:
    """A file name leads to one file."""
    names = [file.stem for file in FILES if file.name != "__init__.py"]

    assert [] == sorted({name for name in names if names.count(name) > 1})


def test_no_two_classes_share_a_name() -> None:
    """A class name has one meaning."""
    places: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(file.relative_to(ROOT)))

    assert {} == {name: found for name, found in places.items() if len(found) > 1}


def test_no_module_is_named_like_a_public_function() -> None:
    """`affectlens.study` is the function: a module of that name would take its place once imported."""
    functions = {name for name in affectlens.__all__ if name.islower()}

    assert {"diff", "load", "write", "study", "plot", "sweep", "evaluate"} <= functions
    assert [] == [str(file.relative_to(ROOT)) for file in FILES if file.stem in functions]


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    """They say what the function does: 'Return …', 'Read …'. Properties may be noun phrases."""
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}: {text.splitlines()[0]}"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef) and not is_property(node)
        if (text := ast.get_docstring(node) or "") and text.split()[0].rstrip(",:") in NO_VERBS
    ]

    assert [] == wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_sizes(file: Path) -> None:
    """Files have ≤ 300 lines, functions ≤ 60, classes ≤ 12 public methods, properties aside."""
    assert 300 >= len(file.read_text("utf-8").splitlines())
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef):
            assert 60 >= (node.end_lineno or 0) - node.lineno + 1, node.name
        if isinstance(node, ast.ClassDef):
            public = [
                n
                for n in node.body
                if isinstance(n, ast.FunctionDef) and n.name[0] != "_" and not is_property(n)
            ]
            assert 12 >= len(public), node.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_signatures(file: Path) -> None:
    """Functions take ≤ 6 arguments, public ones keyword-only after the second; the API's verbs may differ."""
    if layer(file) == "cli":
        return
    for node in ast.walk(tree(file)):
        if not isinstance(node, ast.FunctionDef) or node.name in (*affectlens.__all__, *LONG_SIGNATURES):
            continue
        names = [arg.arg for arg in node.args.args if arg.arg not in ("self", "cls")]
        assert 6 >= len(names) + len(node.args.kwonlyargs), node.name
        if not node.name.startswith("_") or node.name == "__init__":
            assert 2 >= len(names), f"{node.name}: keyword-only after the second"


def test_import_is_light() -> None:
    """`import affectlens` loads none of the heavy packages."""
    assert [] == loaded("import affectlens")


def test_the_proof_of_the_light_import_works() -> None:
    """The subprocess reports a heavy package that is loaded."""
    assert ["pandas"] == loaded("import pandas")


def test_views_see_no_torch() -> None:
    """Showing a table needs no torch."""
    assert "torch" not in loaded("import affectlens.views")


def test_inspecting_needs_neither_torch_nor_transformers() -> None:
    """Headers and names suffice to describe a checkpoint."""
    found = loaded("import affectlens as al; repr(al.load_demo().base)")

    assert [] == [name for name in found if name in ("torch", "transformers")]


def test_public_names_are_pinned_and_resolve() -> None:
    """`__all__` has exactly these names, and each of them resolves."""
    expected = (
        "Site Sites Point Points Checkpoint open_checkpoint Drift diff Trajectory trajectory Agreement "
        "agreement Lens load Transplant Zero Scale Randomise Shuffle Mean Resample Patch Steer Knockout "
        "write Example Scores Task load_task Effects Grid evaluate sweep Plot Report plot Study study Demo "
        "load_demo AffectlensError"
    )

    assert expected.split() == affectlens.__all__
    for name in affectlens.__all__:
        assert getattr(affectlens, name).__name__ == name


def test_dir_shows_the_public_names_alone() -> None:
    """Beside the names of `__all__` there are dunders, no helper and no submodule."""
    assert [] == [name for name in dir(affectlens) if not name.startswith("__")][len(affectlens.__all__) :]
    assert set(affectlens.__all__) <= set(dir(affectlens))


def rings(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other (strongly connected components), or themselves."""
    reached = {name: reach(graph, name) for name in graph}
    groups = {
        tuple(sorted({one, *reached[one]} & within(reached, one))) for one in graph if one in reached[one]
    }
    return sorted(map(list, groups))


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return the modules that one imports, directly or through others."""
    found: set[str] = set()
    left = [start]
    while left:
        for other in graph.get(left.pop(), set()) - found:
            found.add(other)
            left.append(other)
    return found


def within(reached: dict[str, set[str]], one: str) -> set[str]:
    """Return the modules from which one is reached."""
    return {other for other, found in reached.items() if one in found}


def is_property(node: ast.FunctionDef) -> bool:
    """Return True for a property: it is read like an attribute, so its docstring may be a noun phrase."""
    return any("property" in ast.dump(one) for one in node.decorator_list)


def loaded(code: str) -> list[str]:
    """Return the heavy packages that a fresh interpreter has after running code."""
    program = f"import sys; {code}; print([m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found: list[str] = ast.literal_eval(run.stdout)
    return found


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def layer(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def module_name(file: Path) -> str:
    parts = ("affectlens", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def modules_imported(file: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports anywhere, also inside functions and for types."""
    known = {module_name(other) for other in FILES}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("affectlens"):
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in known and deeper != module_name(file) else str(node.module)


def layers_imported(file: Path) -> Iterator[str]:
    """Yield the folders of the package that a file imports anywhere, also inside functions and for types."""
    if file == ROOT / "__init__.py":
        return
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            # `import affectlens…` would slip past the tests of order and cycles.
            assert not any(alias.name.startswith("affectlens") for alias in node.names), file
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("affectlens"):
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            if parts[1] in ORDER:
                yield parts[1]
