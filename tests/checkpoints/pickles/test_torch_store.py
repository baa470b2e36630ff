"""Torch's own files are read from the places of their bytes, and refused where they could run code."""

import argparse
import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from affectlens.checkpoints import Checkpoint
from affectlens.checkpoints.bytes import LocalFile
from affectlens.checkpoints.pickles import archives
from affectlens.checkpoints.pickles.torch_store import PickleStore, open_pickle
from affectlens.errors import CheckpointError

BASE = torch.arange(24.0).reshape(4, 6)

# a kind of value that state dicts hold → an example
KINDS: dict[str, Tensor] = {
    "matrix": BASE,
    "parameter": nn.Parameter(BASE.clone()),
    "bfloat16": torch.randn(3, 5).bfloat16(),
    "float16": torch.randn(3, 5).half(),
    "float8": torch.randn(7).to(torch.float8_e4m3fn),
    "float64": torch.randn(2, 2, 2, dtype=torch.float64),
    "complex": torch.randn(3, dtype=torch.complex64),
    "flags": torch.tensor([True, False, True]),
    "steps": torch.tensor(12345678901),
    "ids": torch.arange(5),
    "one": torch.tensor(1.5),
    "empty": torch.empty(0, 5),
    "offset": BASE[1:],
    "within": BASE[2, 1:4],
}

# a tensor whose elements don't lie end to end → an example
STRIDED: dict[str, Tensor] = {
    "transposed": BASE.T,
    "columns": BASE[:, 1:3],
    "steps": BASE[::2, ::3],
    "permuted": torch.randn(3, 4, 5).permute(2, 0, 1)[1:],
    "expanded": torch.randn(8)[:1].expand(5),
    "tall": torch.randn(16, 2048).T,
    "strip": torch.randn(16, 8192)[:, :1500],
}

# first bytes of what people find under the name .bin → what the error says it is
IMPOSTORS = (
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b"<!DOCTYPE html><html></html>", "web page"),
    (b"\n<html lang=en>", "web page"),
    (b"\x1f\x8b\x08 and so on", "gzip"),
    (b"GGUF\x03\x00\x00\x00", "GGUF"),
    (b"\x89HDF\r\n", "HDF5"),
    (pickle.dumps({"a": 1}), "plain pickle"),
    (b"", "is empty"),
    (b"abc", "begins with b'abc'"),
    (b"PK\x03\x04 and so on", "cut short or broken"),
)

# what was saved → what the error says
WITHOUT_MODEL: tuple[tuple[Any, str], ...] = (
    ({"state": {0: {"exp_avg": BASE}}, "param_groups": [{"lr": 0.1}]}, "optimizer state only"),
    ({"optimizer": {"state": {0: {"exp_avg": BASE}}}, "epoch": 3}, "optimizer state only"),
    ({"optimizer_state_dict": {"base": [BASE]}, "ds_version": "0.14"}, "zero_to_fp32.py"),
    ({"optimizer_state_dict": {"state": {}}}, "zero_to_fp32.py"),
    ({"module": {"a": torch.empty(0), "b": torch.empty(0), "buffer": BASE}}, "zero_to_fp32.py"),
    ({"epoch": 3, "lr": 0.1}, "In it: epoch, lr"),
    ({}, "In it: nothing"),
    ({1: BASE}, "holds no model weights"),
    ({"s": torch.eye(3).to_sparse()}, "all 1 tensors are sparse"),
    ([BASE], "holds a list"),
    (BASE, "holds a tensor"),
)


class Malicious:
    """An object that leaves a mark when an unguarded reader unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class TrainingArguments:
    """A stand-in for the Trainer's class."""


class DictConfig:
    """A stand-in for OmegaConf's class."""


Save = Callable[..., PickleStore]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path to save to."""
    return tmp_path / "pytorch_model.bin"


@pytest.fixture
def opened(path: Path) -> Save:
    """Save a value and open it."""

    def save(value: object, **how: Any) -> PickleStore:
        torch.save(value, path, **how)
        return open_pickle([path], str(path), config={})

    return save


def content(tensor: Tensor) -> bytearray:
    """Return the bytes of the values."""
    whole = tensor.detach().clone(memory_format=torch.contiguous_format)
    return bytearray(whole.reshape(-1).view(torch.uint8).tolist())


def same(one: Tensor, two: Tensor) -> bool:
    """Return whether shape, dtype and every bit are equal."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    bits = [torch.frombuffer(content(tensor), dtype=torch.uint8) for tensor in (one, two) if tensor.numel()]
    return not bits or torch.equal(*bits)


def refused(path: Path) -> str:
    """Return the message for a file that does not open; it is short, names the file and advises no risk."""
    with pytest.raises(CheckpointError) as error:
        open_pickle([path], str(path), config={})
    message = str(error.value)

    assert str(path) in message
    assert 3 >= len(message.splitlines())
    assert "weights_only" not in message
    return message


def rezipped(path: Path, change: Callable[[str, bytes], tuple[str, bytes]], **how: Any) -> None:
    """Write an archive again, with each member as `change` returns it."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in members:
            archive.writestr(*change(name, content))


@pytest.mark.parametrize("legacy", [False, True])
def test_every_kind_of_value_is_read_as_torch_reads_it(opened: Save, path: Path, legacy: bool) -> None:
    """Values and spans equal what torch.load returns, bit by bit."""
    saved = {**KINDS, **STRIDED}
    if legacy:  # torch's reader knows no float8 in these
        del saved["float8"]
    store = opened(saved, _use_new_zipfile_serialization=not legacy)
    expected = torch.load(path, weights_only=True)

    assert saved.keys() == store.headers.keys()
    for name, tensor in expected.items():
        assert same(tensor, store.read(name)), name
        assert tuple(tensor.shape) == store.headers[name].shape
        assert str(tensor.dtype) == f"torch.{store.headers[name].dtype}"
        span = store.span(name)
        assert (span is None) == (name in STRIDED), name
        if span:
            assert content(tensor) == span.read(), name


@pytest.mark.parametrize("name", [name for name, tensor in (KINDS | STRIDED).items() if tensor.ndim])
def test_rows_are_those_of_the_whole(opened: Save, name: str) -> None:
    """Some rows of a tensor equal the same rows of the whole."""
    tensor = (KINDS | STRIDED)[name]
    store = opened({name: tensor, "filled": torch.ones(2)})

    for rows in (slice(0, 1), slice(1, 3), slice(2, 2), slice(0, len(tensor))):
        assert same(tensor[rows], store.read(name, rows)), rows


def test_opening_reads_no_values(opened: Save, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a large file reads its directory and its pickle only, in little memory."""
    torch.save({f"w{i}": torch.zeros(1_000_000) for i in range(12)}, path)
    fetched: list[int] = []
    fetch = LocalFile.fetch

    def counted(self: LocalFile, start: int, stop: int, *, into: memoryview) -> memoryview:
        fetched.append(stop - start)
        return fetch(self, start, stop, into=into)

    monkeypatch.setattr(LocalFile, "fetch", counted)
    tracemalloc.start()
    store = open_pickle([path], str(path), config={})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert 48_000_000 < path.stat().st_size
    assert 20_000 > sum(fetched)
    assert 2_000_000 > peak
    assert 12 == len(store.headers)


def test_a_strip_of_a_transposed_matrix_is_fetched_alone(
    opened: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a transposed matrix cost their own bytes, not those of the matrix."""
    store = opened({"w": torch.randn(16, 8192).T, "other": torch.ones(2)})
    fetched: list[int] = []
    fetch = LocalFile.fetch

    def counted(self: LocalFile, start: int, stop: int, *, into: memoryview) -> memoryview:
        fetched.append(stop - start)
        return fetch(self, start, stop, into=into)

    monkeypatch.setattr(LocalFile, "fetch", counted)
    store.read("w", slice(0, 2048))

    assert [2048 * 4] * 16 == fetched


def test_tied_weights_appear_once(opened: Save) -> None:
    """Of two names for the same bytes the embedding's is kept; other views are tensors of their own."""
    weight = torch.randn(6, 4)
    store = opened(
        OrderedDict(
            {
                "lm_head.weight": weight,
                "model.embed_tokens.weight": weight,
                "part": weight[:2],
                "turned": weight.T,
            }
        )
    )

    assert {"lm_head.weight": "model.embed_tokens.weight"} == store.tied
    assert ["model.embed_tokens.weight", "part", "turned"] == list(store.headers)
    assert same(weight[:2], store.read("part"))
    assert same(weight.T, store.read("turned"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: {"model": model, "epoch": 1},
        lambda model: {"epoch": torch.tensor(1), "state_dict": {"module": model}},
        lambda model: {"module": model, "optimizer": None, "ds_version": "0.14", "param_shapes": []},
        lambda model: {"model": {"state_dict": {"net": model}}},
        lambda model: {"config": argparse.Namespace(lr=0.1, parts=[1]), "model": model},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_envelopes(opened: Save, wrap: Callable[[Any], Any], legacy: bool) -> None:
    """The model is found in the usual envelopes."""
    model = {"layers.0.weight": BASE, "layers.0.bias": torch.ones(6), "note": "text"}
    store = opened(wrap(model), _use_new_zipfile_serialization=not legacy)

    assert ["layers.0.weight", "layers.0.bias"] == list(store.headers)
    assert same(BASE, store.read("layers.0.weight"))


def test_what_is_beside_the_model_is_counted(opened: Save) -> None:
    """The optimizer and another copy of the model are left out and counted."""
    model = {"w": BASE, "step": 3, 7: torch.ones(2)}
    loop: list[Any] = [torch.ones(3)]
    loop.append(loop)
    store = opened(
        {
            "ema_model": {"w": torch.ones(5)},
            "model": model,
            "params": {"w": torch.ones(2)},
            "optimizer": {
                "state": {0: {"a": torch.ones(4), "b": torch.ones(4)}},
                "param_groups": [{"lr": 1}],
            },
            "config": argparse.Namespace(mean=torch.ones(3)),
            "loop": loop,
            "epoch": 60,
        }
    )

    assert ["w"] == list(store.headers)
    assert {
        "ema_model": (1, 5),
        "params": (1, 2),
        "optimizer": (2, 8),
        "config": (1, 3),
        "loop": (1, 3),
        "epoch": (0, 0),
        "model.step": (0, 0),
        "model.7": (1, 2),
    } == store.ignored
    assert "optimizer was left out (2 tensors, 8 elements)." in store.notes
    assert 6 == len(store.notes)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_whose_bytes_are_not_their_values_are_left_out(opened: Save, legacy: bool) -> None:
    """Quantized, sparse and conjugated tensors are counted and named, and the others are read."""
    store = opened(
        {
            "q": torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
            "s": torch.eye(3).to_sparse(),
            "c": torch.randn(2, dtype=torch.complex64).conj(),
            "w": BASE,
            "t": BASE.T,
        },
        _use_new_zipfile_serialization=not legacy,
    )

    assert ["w", "t"] == list(store.headers)
    assert same(BASE, store.read("w"))
    assert same(BASE.T, store.read("t"))
    assert {
        "q": ("quantized (torch.qint8)", 4),
        "s": ("sparse", 9),
        "c": ("conjugated or negated", 2),
    } == store.skipped


def test_sparse_tensors_alone_need_no_values(opened: Save) -> None:
    """A sparse tensor in an archive is left out too."""
    assert {"s": ("sparse", 9)} == opened({"s": torch.eye(3).to_sparse(), "w": BASE}).skipped


@pytest.mark.parametrize(("value", "message"), WITHOUT_MODEL)
def test_files_without_a_model(path: Path, value: Any, message: str) -> None:
    """A file without weights is an error that says what it holds."""
    torch.save(value, path)

    assert message in refused(path)


def test_a_mapping_within_itself_ends(path: Path) -> None:
    """A mapping that contains itself is an error, not a hang."""
    value: dict[str, Any] = {}
    value["model"] = value
    torch.save(value, path)

    assert "holds no model weights" in refused(path)


def test_a_shard_of_zero_is_named(tmp_path: Path) -> None:
    """DeepSpeed's shards are recognised by their names, whatever they hold."""
    path = tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"w": BASE}, path)

    assert "zero_to_fp32.py" in refused(path)


def test_a_tensor_without_values_is_an_error(path: Path) -> None:
    """A model saved from the meta device is an error: it has no values."""
    torch.save({"w": BASE.to("meta")}, path)

    assert "'w': was saved without values" in refused(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_runs(path: Path, tmp_path: Path, legacy: bool) -> None:
    """A pickle that would run a command is refused, and the command did not run."""
    mark = tmp_path / "mark"
    value = {"model": {"w": BASE}, "x": Malicious(mark)}
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    message = refused(path)

    assert not mark.exists()
    assert "posix.system" in message
    assert "Convert it to safetensors where you trust it" in message


def test_a_whole_module_is_refused(path: Path) -> None:
    """A pickled module is refused, since it needs its code."""
    torch.save(nn.Linear(2, 3), path)
    message = refused(path)

    assert "whole module" in message
    assert "torch.nn.modules.linear.Linear" in message
    assert "Convert it to safetensors where you trust it" in message


def test_settings_are_refused_by_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer's arguments and OmegaConf's objects get their own messages."""
    torch.save(TrainingArguments(), path)

    assert "settings of the training only" in refused(path)
    name = pickle.dumps(DictConfig(), protocol=2).replace(
        f"c{__name__}\nDictConfig".encode(), b"comegaconf.dictconfig\nDictConfig"
    )
    torch.save({"w": BASE}, path)
    rezipped(path, lambda member, old: (member, name if member.endswith("data.pkl") else old))

    assert "an OmegaConf object, which would run code (omegaconf.dictconfig.DictConfig)" in refused(path)


def test_another_protocol_is_refused_quietly(path: Path) -> None:
    """A pickle of a newer protocol is refused without a warning."""
    torch.save({"w": [frozenset({1}), "x" * 70_000]}, path, pickle_protocol=4)

    assert "refused" in refused(path)


@pytest.mark.parametrize(("content", "message"), IMPOSTORS)
def test_impostors(path: Path, content: bytes, message: str) -> None:
    """A file of another format is an error that names the format."""
    path.write_bytes(content)

    assert message in refused(path)


def test_safetensors_under_another_name(path: Path) -> None:
    """A safetensors file is recognised, whatever the length of its header."""
    for count in range(1, 12):
        save_file({f"tensor{i}": BASE.clone() for i in range(count)}, path)

        assert "safetensors" in refused(path)


def test_deflated_members_are_refused(path: Path) -> None:
    """Compressed members are refused: their bytes are not the values."""
    torch.save({"w": BASE}, path)
    rezipped(path, lambda name, content: (name, content), compression=zipfile.ZIP_DEFLATED)

    assert "compressed members" in refused(path)


def test_archives_zipped_again_open(path: Path) -> None:
    """Members at other offsets than torch computes are read where they are."""
    torch.save({"a": BASE, "b": BASE + 1}, path)
    rezipped(path, lambda name, content: (name, content))
    store = open_pickle([path], str(path), config={})

    assert same(BASE + 1, store.read("b"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_doubled_members_are_refused(path: Path) -> None:
    """Two members of one name are refused: two readers could read different ones."""
    torch.save({"w": BASE, "b": BASE + 1}, path)
    rezipped(path, lambda name, content: (name.replace("data/1", "data/0"), content))

    assert "two members named" in refused(path)


def test_big_endian_is_refused(path: Path) -> None:
    """Values of the other byte order are refused."""
    torch.save({"w": BASE}, path)
    rezipped(path, lambda name, content: (name, b"big" if name.endswith("byteorder") else content))

    assert "big-endian" in refused(path)


def test_encrypted_members_are_refused(path: Path) -> None:
    """An encrypted member is an error, not noise."""
    torch.save({"w": BASE}, path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 8] |= 1
    path.write_bytes(content)

    assert "encrypted members" in refused(path)


def test_overlapping_members_are_refused(path: Path) -> None:
    """Members that share bytes are refused."""
    torch.save({"w": BASE, "b": BASE + 1}, path)
    content = bytearray(path.read_bytes())
    entries = [content.index(b"/data/0", content.index(b"PK\x01\x02")), content.rindex(b"/data/1")]
    starts = [content.rindex(b"PK\x01\x02", 0, entry) + 42 for entry in entries]
    content[starts[1] : starts[1] + 4] = content[starts[0] : starts[0] + 4]
    path.write_bytes(content)

    assert "overlaps another" in refused(path)


def test_a_huge_pickle_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle beyond the limit is not read."""
    torch.save({"w": BASE}, path)
    monkeypatch.setattr(archives, "_PICKLE", 10)

    assert "its list of tensors is larger than 10 bytes" in refused(path)


def test_other_archives_are_named(path: Path) -> None:
    """Another zip archive and a TorchScript program are errors that say so."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")

    assert "no data.pkl" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/constants.pkl", b"")

    assert "TorchScript" in refused(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_fit_their_storage(path: Path, legacy: bool) -> None:
    """A tensor of 2^40 elements in four bytes is an error."""
    torch.save({"w": torch.ones(1).expand(2**40)}, path, _use_new_zipfile_serialization=not legacy)

    assert "'w': claims more elements than it holds" in refused(path)


def test_tensors_stay_within_their_storage(path: Path) -> None:
    """A tensor is checked against the bytes that exist, not against those that are claimed."""
    torch.save({"w": BASE[2:], "v": torch.ones(4)}, path)
    rezipped(path, lambda name, content: (name, content[:-4] if name.endswith("data/0") else content))

    assert "'w': reaches beyond the 92 bytes of its storage" in refused(path)


def test_missing_members_are_an_error(path: Path) -> None:
    """A pickle that names a missing storage is an error."""
    torch.save({"w": BASE}, path)
    rezipped(path, lambda name, content: (name.replace("data/0", "data/9"), content))

    assert "is broken" in refused(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_cut_and_changed_files_are_errors(path: Path, legacy: bool) -> None:
    """A file cut short anywhere, or with a changed byte in its pickle, opens or is a clear error."""
    torch.save({"model": {"w": BASE}, "epoch": 1}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for end in range(0, len(content) - 1, 7):
        path.write_bytes(content[:end])
        refused(path)
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            store = open_pickle([path], str(path), config={})
        except CheckpointError:
            continue
        for name, header in store.headers.items():
            assert header.shape == tuple(store.read(name).shape)


def test_shards_are_one_store(tmp_path: Path) -> None:
    """Shards are read together; a name in two of them is an error."""
    paths = [tmp_path / f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    torch.save({"a": BASE, "x": 1}, paths[0])
    torch.save({"b": BASE + 1, "x": 1}, paths[1])
    store = open_pickle(paths, "owner/name", config={"model_type": "llama"}, revision="abc")

    assert {"a", "b"} == store.headers.keys()
    assert same(BASE + 1, store.read("b"))
    assert ("owner/name", "pickle", {"model_type": "llama"}) == (store.name, store.format, store.config)
    assert (2, "abc") == (store.facts["files"], store.facts["revision"])
    assert {"x": (0, 0)} == store.ignored
    torch.save({"a": BASE}, paths[1])
    with pytest.raises(CheckpointError, match=r"'a': stored in 'pytorch_model-00001-of-00002.bin' and"):
        open_pickle(paths, "owner/name", config={})


def test_facts_tell_contents_apart(opened: Save) -> None:
    """The header hash covers names and shapes, the content hash everything."""
    one, two = opened({"w": BASE}).facts, opened({"w": BASE + 1}).facts
    three = opened({"v": BASE}).facts

    assert one["header_sha256"] == two["header_sha256"]
    assert one["header_sha256"] != three["header_sha256"]
    assert one["content_sha256"] != two["content_sha256"]


def test_a_change_while_reading_is_noticed(opened: Save, path: Path) -> None:
    """A file written to while it is read is an error, never a mixture."""
    store = opened({"w": BASE})
    store.check()
    torch.save({"w": torch.ones(50)}, path)

    with pytest.raises(CheckpointError, match="changed while it was read"):
        store.check()


def test_no_pipe_is_opened(tmp_path: Path) -> None:
    """A pipe is refused: reading it would block for ever."""
    os.mkfifo(tmp_path / "model.pth")

    assert "not an ordinary file" in refused(tmp_path / "model.pth")


def test_a_checkpoint_stands_on_it(opened: Save) -> None:
    """A torch file has the same sites as a safetensors file."""
    store = opened(
        {
            "model": {
                "model.layers.0.mlp.gate_proj.weight": BASE,
                "model.layers.0.mlp.up_proj.weight": BASE + 1,
            }
        }
    )
    checkpoint = Checkpoint(store)

    assert 2 == len(checkpoint.sites)
    assert 48 == checkpoint.parameters
