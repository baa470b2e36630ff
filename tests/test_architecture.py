"""The structure that the design promises: one-way imports, short files, short functions, a light import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import affectlens

ROOT = Path(affectlens.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ORDER = (
    "lazy", "printable", "html", "errors", "files", "executing", "stats", "sites", "table_formats",
    "table_schema", "table", "checkpoints", "tasks", "demo", "drift", "probes", "lens", "interventions",
    "writing", "effects", "tuning", "credit", "views", "studying", "cli", "__main__",
)  # fmt: skip
HEAVY = ("torch", "transformers", "nnsight", "transformer_lens", "peft", "plotly", "pandas")

# What is allowed to be longer or take more arguments, and why.
LONG_SIGNATURES: dict[str, str] = {}


def test_layers_are_one_way() -> None:
    """A folder imports only from folders to its left."""
    wrong = [
        f"{file.relative_to(ROOT)} imports {other}"
        for file in FILES
        if (own := layer(file)) in ORDER
        for other in layers_imported(file)
        if ORDER.index(other) > ORDER.index(own)
    ]

    assert [] == wrong


def test_every_module_has_its_place_in_the_order() -> None:
    """No folder or file stands outside the argument."""
    assert set(ORDER) >= {layer(file) for file in FILES} - {"__init__"}


def test_there_is_no_import_cycle() -> None:
    """Modules can be read from the bottom up."""
    graph = {module_name(file): set(modules_imported(file)) for file in FILES}
    seen: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name not in seen:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            seen.add(name)

    for name in graph:
        visit(name, ())


def test_there_is_no_star_import() -> None:
    """Every name says where it comes from."""
    stars = [
        str(file)
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]

    assert [] == stars


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_sizes(file: Path) -> None:
    """Files have ≤ 300 lines, functions ≤ 60, classes ≤ 12 public methods, properties aside."""
    assert 300 >= len(file.read_text("utf-8").splitlines())
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef):
            assert 60 >= (node.end_lineno or 0) - node.lineno + 1, node.name
        if isinstance(node, ast.ClassDef):
            public = [
                n for n in node.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_" and not seen(n)
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
    """The subprocess does see a heavy package that is loaded."""
    assert ["pandas"] == loaded("import pandas")


def test_views_see_no_torch() -> None:
    """Showing a table needs no torch."""
    assert "torch" not in loaded("import affectlens.views")


def test_inspecting_needs_neither_torch_nor_transformers() -> None:
    """Headers and names suffice to say what a checkpoint is."""
    found = loaded("import affectlens as al; repr(al.load_demo().base)")

    assert [] == [name for name in found if name in ("torch", "transformers")]


def test_public_names_are_pinned_and_resolve() -> None:
    """`__all__` is what it was, and every name in it exists."""
    expected = (
        "Site Sites Point Points Checkpoint open_checkpoint Drift diff Trajectory trajectory Agreement "
        "agreement Lens load Transplant Zero Scale Randomise Shuffle Mean Resample Patch Steer Knockout "
        "write Example Scores Task load_task Effects Grid evaluate sweep Plot Report plot Study study Demo "
        "load_demo AffectlensError"
    )

    assert expected.split() == affectlens.__all__
    for name in affectlens.__all__:
        assert getattr(affectlens, name).__name__ == name


def seen(node: ast.FunctionDef) -> bool:
    """Whether a function is a property: read like an attribute, it is no verb."""
    return any("property" in ast.dump(one) for one in node.decorator_list)


def loaded(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter has after running code."""
    program = f"import sys; {code}; print([m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found: list[str] = ast.literal_eval(run.stdout)
    return found


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def layer(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def module_name(file: Path) -> str:
    parts = ("affectlens", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def modules_imported(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports when it is imported, not later or for types alone."""
    known = {module_name(other) for other in FILES}
    for node in ast.iter_child_nodes(tree(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("affectlens"):
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in known and deeper != module_name(file) else str(node.module)


def layers_imported(file: Path) -> Iterator[str]:
    """Folders of the package that a file imports anywhere, also inside functions and for types."""
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
