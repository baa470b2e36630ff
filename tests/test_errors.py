"""Errors are caught by their root or by a built-in, print as one safe line, and survive a process."""

import pickle

import pytest

import affectlens as al
from affectlens import errors
from affectlens.errors import CheckpointError, NoSuchSite, near, quoted

BUILT_IN = {
    "CheckpointError": ValueError,
    "NothingToCompare": ValueError,
    "NoSuchSite": KeyError,
    "WrongCount": ValueError,
    "TaskError": ValueError,
    "LensError": RuntimeError,
    "JournalError": ValueError,
    "ExecutionError": RuntimeError,
    "RoleRefuted": ValueError,
    "TableError": ValueError,
    "WriteError": OSError,
    "MissingExtra": ImportError,
}
HUB = "hub:org/model/" + "very-long-folder/" * 20 + "model.safetensors"


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_error_is_also_a_built_in(name: str) -> None:
    """`except` of the root or of the built-in catches it, and the module's docstring lists it so."""
    kind = getattr(errors, name)
    line = next(line for line in str(errors.__doc__).splitlines() if f" {name} " in line)

    assert issubclass(kind, al.AffectlensError)
    assert issubclass(kind, BUILT_IN[name])
    assert f"({BUILT_IN[name].__name__})" in line


def test_every_error_is_listed() -> None:
    """A new class needs a line in the table above."""
    found = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type)}

    assert {*BUILT_IN, "AffectlensError", "Remark"} == {
        name for name in found if name not in ("Path", "Iterable")
    }


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CheckpointError("a/m.safetensors", "is empty"), "a/m.safetensors: is empty"),
        (CheckpointError("m.bin", "is broken", fix="Save it again"), "m.bin: is broken. Save it again"),
        (CheckpointError("m.bin", "is broken", key="w\x1b"), "m.bin: tensor 'w�': is broken"),
        (CheckpointError("m.bin", "is broken", key=""), "m.bin: tensor '': is broken"),
        (NoSuchSite("no site has role='gate'"), "no site has role='gate'"),
        (NoSuchSite(), ""),
        (errors.WriteError("t.csv: can't be written"), "t.csv: can't be written"),
        (errors.TaskError("one\r\ntwo\x1bthree"), "one two�three"),
    ],
)
def test_a_message_is_one_line(error: Exception, expected: str) -> None:
    """File, tensor, reason and remedy; control characters of a name are replaced."""
    assert expected == str(error)


def test_a_long_path_keeps_its_file_name() -> None:
    """The folders are shortened, the reason stays."""
    found = str(CheckpointError(HUB, "is empty"))

    assert found.startswith("hub:org/model/")
    assert found.endswith("very-long-folder/model.safetensors: is empty")
    assert 100 == len(found.removesuffix("model.safetensors: is empty"))


def test_a_checkpoint_error_travels_whole() -> None:
    """Unpickled in another process it has the same parts and the same message."""
    error = CheckpointError("m.bin", "is broken", key="a.weight", fix="Download it again")
    found = pickle.loads(pickle.dumps(error))

    assert type(error) is type(found)
    assert vars(error) == vars(found)
    assert str(error) == str(found)


@pytest.mark.parametrize(
    ("asked", "known", "expected"),
    [
        ("gate", ["gate_proj", "up_proj"], "gate_proj, up_proj. Did you mean 'gate_proj'?"),
        ("xyz", ["gate_proj"], "gate_proj"),
        (3, [0, 1], "0, 1"),
        ("x", [], "none"),
        ("a", [f"layer{n}" for n in range(9)], ", ".join(f"layer{n}" for n in range(8)) + ", …"),
    ],
)
def test_near_lists_the_names_and_the_closest(asked: object, known: list[object], expected: str) -> None:
    """At most eight names, and a guess if one is close."""
    assert expected == near(asked, known)


def test_a_name_from_a_file_is_quoted_and_short() -> None:
    """It can't fill a terminal or hide in it."""
    assert "'a�b'" == quoted("a\u200bb")
    assert 122 == len(quoted("x" * 1000))
