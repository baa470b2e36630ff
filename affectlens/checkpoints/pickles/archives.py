"""The two layouts of torch files, archives and the files of before torch 1.6, and where each storage is.

    file ── open_torch_file ──▶ the saved object (see `unpickling`), and the bytes of each storage it names

An archive is an uncompressed zip: one member is the pickle, each other a storage. Older files are five
pickles, the fourth of them the saved object, and then the storages one after the other.
"""

import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from affectlens.checkpoints.bytes import DOWNLOAD_AGAIN, FIRST, LocalFile, Span, refuse_impostors
from affectlens.checkpoints.pickles.rebuilding import CONSOLIDATE, CONVERT, WIDTHS
from affectlens.checkpoints.pickles.unpickling import Unpickler
from affectlens.errors import CheckpointError
from affectlens.printable import plain

_CUT = "the zip archive is cut short or broken"
_BIG_ENDIAN = "was saved on a big-endian machine"
# Bytes. The 100,000 tensors of the largest models need 14 MB and 9 MB.
_PICKLE, _DIRECTORY = 64_000_000, 12_000_000
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of files from before torch 1.6

_IMPOSTORS = (
    (rb".{6}\0\0\{", "this is a safetensors file", "Rename it to .safetensors"),
    (rb"\x80[\x00-\x05]", "this is a plain pickle, not a file of torch.save", CONVERT),
)


class Saved(NamedTuple):
    """The saved object, and the bytes of each storage by its key."""

    value: object
    storages: Mapping[str, Span]


def open_torch_file(file: LocalFile) -> Saved:
    """Read the structure of a torch file, but no values; raises `CheckpointError` for any other file."""
    return _from_archive(file) if recognised(file) == "zip" else _from_before(file)


def recognised(file: LocalFile) -> Literal["zip", "legacy"]:
    """Return the layout of a torch file; raises `CheckpointError` for any other file, saying what it is."""
    first = bytes(Span(file, 0, min(FIRST, file.size)).read())
    if "zero_pp_rank_" in file.path.name:
        raise CheckpointError(file.name, "this is a shard of DeepSpeed ZeRO", fix=CONSOLIDATE)
    if first.startswith(b"PK\x03\x04"):
        return "zip"
    if first.startswith(_LEGACY):
        return "legacy"
    refuse_impostors(file.name, first, others=_IMPOSTORS)
    shown = f"begins with {first[:8]!r}" if first else "is empty"
    raise CheckpointError(file.name, f"is not a torch file: it {shown}", fix=DOWNLOAD_AGAIN)


def _from_before(file: LocalFile) -> Saved:
    with _stream(Span(file, 0, file.size), _PICKLE) as stream:
        pickles = Unpickler(stream, file.name)
        # Magic number, protocol, facts of the machine, the saved object, the keys of the storages in order.
        _, _, machine, value, keys = (pickles.load() for _ in range(5))
        start = stream.tell()
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise CheckpointError(file.name, _BIG_ENDIAN, fix="Convert it there")
    storages: dict[str, Span] = {}
    for key in keys if isinstance(keys, list) else ():
        known = pickles.storages.get(key) if isinstance(key, str) else None
        if known is None or key in storages or start + 8 > file.size:
            raise CheckpointError(
                file.name, "is broken: its storages are not the ones that it names", fix=DOWNLOAD_AGAIN
            )
        # A storage begins with its number of elements.
        (count,) = struct.unpack("<q", Span(file, start, start + 8).read())
        start, stop = start + 8, start + 8 + count * WIDTHS[known.dtype]
        if not start <= stop <= file.size:
            reason = f"is cut short or broken: a storage ends at byte {stop:,} of {file.size:,}"
            raise CheckpointError(file.name, reason, fix=DOWNLOAD_AGAIN)
        storages[key] = Span(file, start, stop)
        start = stop
    return Saved(value, storages)


def _from_archive(file: LocalFile) -> Saved:
    try:
        with _stream(Span(file, 0, file.size), _DIRECTORY) as whole, zipfile.ZipFile(whole) as opened:
            members = _members(file, opened.infolist())
    except CheckpointError:
        raise
    except Exception:  # zipfile raises errors of many kinds, some not its own
        raise CheckpointError(file.name, _CUT, fix=DOWNLOAD_AGAIN) from None
    root = _root(file, members)
    # Older archives have no note on the byte order, and count as little-endian.
    if _record(members, f"{root}/byteorder") not in (b"", b"little"):
        raise CheckpointError(file.name, _BIG_ENDIAN, fix="Convert it there")
    with _stream(members[f"{root}/data.pkl"], _PICKLE) as stream:
        value = Unpickler(stream, file.name).load()
    data = f"{root}/data/"
    return Saved(value, {name[len(data) :]: span for name, span in members.items() if name.startswith(data)})


def _record(members: Mapping[str, Span], name: str) -> bytes:
    """Return one of torch's short notes in an archive, such as the byte order; empty if there is none."""
    span = members.get(name)
    return bytes(span.part(0, min(16, span.stop - span.start)).read()) if span else b""


def _members(file: LocalFile, listed: list[zipfile.ZipInfo]) -> dict[str, Span]:
    """Return where the bytes of each member are; no two overlap.

    Raises `CheckpointError` for compressed, encrypted, repeated, overlapping or missing members.
    """
    found: dict[str, Span] = {}
    for info in listed:
        if info.flag_bits & 1:
            raise CheckpointError(file.name, "has encrypted members", fix="Unpack and save it again")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            reason = "has compressed members, so their bytes are not the values"
            raise CheckpointError(file.name, reason, fix="Load and save it again with torch.save")
        if info.filename in found:
            raise CheckpointError(file.name, f"has two members named {plain(info.filename)!r}")
        found[info.filename] = _member(file, info)
    end = 0
    for name, span in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if span.start < end:
            raise CheckpointError(file.name, f"the member {plain(name)!r} overlaps another")
        end = span.stop
    return found


def _member(file: LocalFile, info: zipfile.ZipInfo) -> Span:
    # The directory does not say where the bytes begin; the lengths in the member's own header do.
    header, data = info.header_offset, info.header_offset + 30
    if header < 0 or data > file.size:
        raise CheckpointError(file.name, _CUT, fix=DOWNLOAD_AGAIN)
    magic, method, name, extra = struct.unpack("<4s4xH16xHH", Span(file, header, data).read())
    start = data + name + extra
    if magic != b"PK\x03\x04" or method or start + info.file_size > file.size:
        raise CheckpointError(file.name, _CUT, fix=DOWNLOAD_AGAIN)
    return Span(file, start, start + info.file_size)


def _root(file: LocalFile, members: Mapping[str, Span]) -> str:
    """Return the folder inside the archive that holds everything."""
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    roots = [root for root in roots if "/" not in root]
    if any(f"{root}/constants.pkl" in members for root in roots):
        raise CheckpointError(file.name, "this is a TorchScript program", fix="Save its state_dict instead")
    if len(roots) != 1:
        raise CheckpointError(
            file.name, f"this is a zip archive with {len(roots) or 'no'} data.pkl, not a torch file"
        )
    return roots[0]


class _Raw(io.RawIOBase):
    """A part of a file as a stream, which raises once more than `most` bytes were read."""

    def __init__(self, span: Span, most: int) -> None:
        self._span, self._at, self._most, self._read = span, 0, most, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        size = self._span.stop - self._span.start
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: size}[whence] + offset
        if self._at < 0:
            raise ValueError("before the start")
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._span.stop - self._span.start)
        count = max(0, stop - self._at)
        self._read += count
        if self._read > self._most:
            reason = f"its list of tensors is larger than {self._most:,} bytes"
            raise CheckpointError(self._span.of.name, reason)
        view = memoryview(buffer)[:count]
        got = self._span.fetch(self._at, stop, into=view)
        if got.obj is not view.obj:
            view[:] = got
        self._at += count
        return count


def _stream(span: Span, most: int) -> io.BufferedReader:
    return io.BufferedReader(_Raw(span, most), 1 << 12)
