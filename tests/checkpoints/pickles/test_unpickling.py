"""The reader of pickles returns what torch writes, and never runs anything."""

import io
import pickle
from collections import Counter, OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._weights_only_unpickler import _get_allowed_globals

from affectlens.checkpoints.pickles import unpickling
from affectlens.checkpoints.pickles.rebuilding import ALLOWED, Named, Odd, Settings, Stored, TorchStorage
from affectlens.checkpoints.pickles.unpickling import Unpickler
from affectlens.errors import CheckpointError
from tests.hostile.pickling import call, mapping, named, numbers, program, tensor, text

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**2000), 2**2000) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)
STORED = Stored(TorchStorage("0", "float32"), 0, (2, 4), (4, 1), "float32")
# instructions → the record that they come to
RECORDS: tuple[tuple[bytes, object], ...] = (
    (tensor((2, 4)), STORED),
    (tensor((2, 4), (1, 2), offset=3), STORED._replace(offset=3, strides=(1, 2))),
    (call("torch._utils._rebuild_parameter", tensor((2, 4)), b"\x88", b"}"), STORED),
    (call("torch._tensor._rebuild_from_type_v2", named("torch.nn.parameter.Parameter"),
          named("torch.Tensor"), tensor((2, 4)) + b"\x85", b"}"), STORED),
    (call("torch.Size", numbers((2, 3))), (2, 3)),
    (call("collections.OrderedDict", b"](" + b"](" + text("a") + b"K\x01e" + b"e"), {"a": 1}),
    (named("torch.bfloat16"), Named("torch.bfloat16")),
)  # fmt: skip


def load(content: bytes) -> Any:
    """Return the object in a pickle."""
    stream = io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]
    return Unpickler(stream, "file.bin").load()


@given(PLAIN)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_plain_data_is_read_as_python_reads_it(value: Any) -> None:
    """Numbers, text, tuples, lists and dicts are read as by Python, at any depth."""
    assert value == load(pickle.dumps(value, 2))


def test_mappings_of_other_classes_are_dicts() -> None:
    """An OrderedDict keeps its order, and loses attributes that could replace its methods."""
    value = OrderedDict(b=1, a=2)
    value._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]

    assert [("b", 1), ("a", 2)] == list(load(pickle.dumps(value, 2)).items())
    assert {"b": 1} == load(pickle.dumps(Counter(b=1), 2))


@pytest.mark.parametrize(("value", "record"), RECORDS)
def test_what_torch_names_becomes_a_record(value: bytes, record: object) -> None:
    """Tensors and sizes become records of their arguments."""
    assert record == load(program(value))


def test_settings_are_read_and_no_object_is_made() -> None:
    """The attributes of an `argparse.Namespace` are read as they were saved."""
    saved = mapping({"lr": b"K\x01"})
    found = load(program(named("argparse.Namespace") + b")\x81" + saved + b"b"))

    assert (Settings, {"lr": 1}) == (type(found), found.attributes)


def test_a_key_that_is_a_tuple_is_not_hashed() -> None:
    """A tuple as key is not hashed: for one nested a million deep that would kill the process."""
    (key,) = load(program(b"})" + b"\x85" * 1_000_000 + b"Ns"))

    assert (Odd, "a tuple") == (type(key), str(key))


def test_nothing_is_allowed_that_torch_refuses() -> None:
    """Every allowed name is allowed by torch too, but for two without code: Namespace and Buffer."""
    assert {"argparse.Namespace", "torch.nn.parameter.Buffer"} == ALLOWED - _get_allowed_globals().keys()


def test_instructions_are_counted_over_all_pickles_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on instructions is for a file, however many pickles it has."""
    monkeypatch.setattr(unpickling, "_MOST", 8)
    stream = io.BufferedReader(io.BytesIO(program(b"N" * 3) * 2))  # type: ignore[arg-type]
    pickles = Unpickler(stream, "file.bin")
    pickles.load()

    with pytest.raises(CheckpointError, match=r"file\.bin: its pickle has more than 8 instructions"):
        pickles.load()
