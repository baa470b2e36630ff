"""Measure the shape of the package: its files, its import cycles and its words.

    python -m benchmarks.survey [FOLDER] [--json] [--tests]

FOLDER is a checkout (by default this one); `--tests` also runs its `make test` and times it.
"""

import argparse
import ast
import io
import json
import re
import statistics
import subprocess
import time
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.sparse.csgraph import connected_components

# A docstring that begins with one of these words does not begin with a verb.
NO_VERB = re.compile(
    r"(?:A|An|All|Any|As|At|Both|By|Each|Either|Every|For|From|How|If|In|Its?|No|None|Of|On|One|Only|Same|So"
    r"|Some|That|The|Their|These|This|Those|To|Two|What|When|Where|Whether|Which|Whose|Who|With|Without)\b"
)
_ENDINGS = re.compile(r"(?:ings?|ions?|ments?|ers?|ed|es|e|s)$")
_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class Source:
    """A file of the package, parsed once."""

    name: str
    text: str

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    def imports(self, files: dict[str, str]) -> Iterator[str]:
        """Yield the files imported anywhere: at the top, inside functions, and for types alone."""
        for node in self.nodes:
            for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                start = node.module if isinstance(node, ast.ImportFrom) else alias.name
                found = files.get(f"{start}.{alias.name}", files.get(str(start)))
                if found not in (None, self.name):
                    yield str(found)

    def tokens(self) -> tuple[int, int, int]:
        """Count the lines with a comment, those of code without docstrings, and `Any` outside imports."""
        texts = _spans(n for n in self.nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
        imports = _spans(n for n in self.nodes if isinstance(n, ast.Import | ast.ImportFrom))
        comments, code, anys = set[int](), set[int](), 0
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                comments.add(token.start[0])
            elif token.type not in _LAYOUT:
                code.update(range(token.start[0], token.end[0] + 1))
                anys += token.string == "Any" and token.start[0] not in imports
        return len(comments), len(code - texts), anys


def survey(root: Path) -> dict[str, object]:
    """Return every figure of the package in `root/affectlens`."""
    package = root / "affectlens"
    paths = sorted(package.rglob("*.py"))
    sources = [Source(path.relative_to(package).as_posix(), path.read_text("utf-8")) for path in paths]
    functions = [(s.name, node) for s in sources for node in s.nodes if isinstance(node, ast.FunctionDef)]
    lengths = [(len(_spans([node])), f"{name}: {node.name}") for name, node in functions]
    lines = [source.text.count("\n") for source in sources]
    files = {f"affectlens.{s.name[:-3].replace('/', '.')}".removesuffix(".__init__"): s.name for s in sources}
    graph = {source.name: set(source.imports(files)) for source in sources}
    importers = Counter(target for targets in graph.values() for target in targets)
    # A noun may describe a property, so its docstring does not count.
    verbs = [n for _, n in functions if "property" not in " ".join(map(ast.unparse, n.decorator_list))]
    docs = [doc for node in verbs if (doc := ast.get_docstring(node))]
    comments, code, anys = (sum(column) for column in zip(*(s.tokens() for s in sources), strict=True))
    rooms = [name for name in graph if not name.endswith("__init__.py")]
    return {
        "files": len(sources),
        "lines": sum(lines),
        "median lines of a file": statistics.median(lines),
        "90th percentile": round(float(np.quantile(lines, 0.9))),
        "largest file": "{1}, {0}".format(*max(zip(lines, graph, strict=True))),
        "longest function": "{1}, {0}".format(*max(lengths)),
        "import cycles, all imports counted": _cycles(graph),
        "Any outside imports": anys,
        "function docstrings": len(docs),
        "of these without a verb first": sum(bool(NO_VERB.match(doc)) for doc in docs),
        "lines of code": code,
        "lines of code for each comment": round(code / max(comments, 1), 1),
        "files named by a gerund": sum(name.endswith("ing.py") for name in rooms),
        "files imported by one file only": sum(importers[name] == 1 for name in rooms),
        "files of one stem or one root": _namesakes(rooms),
    }


def _cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of two files or more, the largest first."""
    matrix = np.array([[other in targets for other in graph] for targets in graph.values()])
    groups = defaultdict(list)
    for name, label in zip(graph, connected_components(matrix, connection="strong")[1], strict=True):
        groups[label].append(name)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def _namesakes(names: list[str]) -> list[str]:
    """Return the pairs of files whose stems are equal or share a root, as `sums` and `summing` do."""
    roots = defaultdict(list)
    for name in names:
        roots[re.sub(r"(.)\1$", r"\1", _ENDINGS.sub("", Path(name).stem))].append(name)
    return [" ~ ".join(pair) for group in roots.values() for pair in combinations(group, 2)]


def _spans(nodes: Iterable[ast.AST]) -> set[int]:
    return {line for node in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}  # type: ignore[attr-defined]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1])
    for option in ("--json", "--tests"):
        parser.add_argument(option, action="store_true")
    asked = parser.parse_args()
    found = survey(asked.folder)
    if asked.tests:
        began = time.monotonic()
        subprocess.run(["make", "test"], cwd=asked.folder, check=True, capture_output=True)
        found["minutes of `make test`"] = round((time.monotonic() - began) / 60, 1)
    if asked.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        rows = value if isinstance(value, list) else None
        print(f"{name:36} {value if rows is None else len(rows)}")
        for row in rows or ():
            print("   ", row if isinstance(row, str) else f"{len(row)} files: {', '.join(row)}")


if __name__ == "__main__":
    main()
