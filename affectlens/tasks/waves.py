"""Take a WAV file apart, also one that is cut or states a wrong size.

Recorders that lose power, programs that write into a pipe and broken downloads leave files whose header
states another size than the file has. Decoders refuse such files, or shorten them silently.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from affectlens.errors import TaskError

PCM, FLOAT = 1, 3
# Other codecs of a WAV file that libsndfile decodes, by their number in its header.
CODECS = {
    2: "ADPCM",
    6: "A-law",
    7: "µ-law",
    0x11: "ADPCM",
    0x31: "GSM",
    0x38: "ADPCM",
    0x40: "ADPCM",
    0x55: "MP3",
}
_EXTENSIBLE = 0xFFFE  # the codec is then in a longer header
_WHOLE = 0xFFFFFFFF  # of RF64: the size is in another chunk
_CHUNKS = 10_000  # of a file, at most


@dataclass(frozen=True)
class Wave:
    """A WAV file whose header states what is there, its codec, and what was wrong with the header."""

    file: bytes
    codec: int
    wrong: str = ""


@dataclass(frozen=True)
class _Chunk:
    name: bytes
    start: int  # of its content
    size: int  # as stated


def is_wave(found: bytes) -> bool:
    """Return whether a file begins as a WAV file does."""
    return found[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and found[8:12] == b"WAVE"


def take_apart(found: bytes) -> Wave:
    """Return the WAV file with true sizes. Raises `TaskError` where it has no header or no samples."""
    order = ">" if found[:4] == b"RIFX" else "<"
    before: list[_Chunk] = []
    for chunk in _chunks(found, order):
        if chunk.name == b"data":
            break
        before.append(chunk)
    else:
        raise TaskError("this sound can't be read: the file ends before its samples")
    fmt = next((found[one.start : one.start + one.size] for one in before if one.name == b"fmt "), b"")
    if len(fmt) < 16:
        raise TaskError("this sound can't be read: no header in front of its samples")
    stated = chunk.size
    large = next((one for one in before if one.name == b"ds64" and one.size >= 16), None)
    if stated == _WHOLE and large is not None:
        (stated,) = struct.unpack_from(order + "Q", found, large.start + 8)
    size, wrong = _true_size(found, chunk.start, stated, order=order)
    (codec,) = struct.unpack_from(order + "H", fmt)
    if codec == _EXTENSIBLE and len(fmt) >= 26:
        (codec,) = struct.unpack_from(order + "H", fmt, 24)
    if wrong or codec in (PCM, FLOAT):  # a cut may go through a sample or a block
        size -= size % max(1, *struct.unpack_from(order + "H", fmt, 12))
    kept = b"".join(
        found[one.start - 8 : one.start + one.size + one.size % 2] for one in before if one.name != b"ds64"
    )
    body = b"WAVE" + kept + b"data" + struct.pack(order + "I", size) + found[chunk.start : chunk.start + size]
    body += bytes(size % 2)
    head = b"RIFX" if order == ">" else b"RIFF"
    return Wave(head + struct.pack(order + "I", len(body)) + body, codec, wrong)


def _chunks(found: bytes, order: str, at: int = 12) -> Iterator[_Chunk]:
    for _ in range(_CHUNKS):
        if at + 8 > len(found):
            return
        (size,) = struct.unpack_from(order + "I", found, at + 4)
        yield _Chunk(found[at : at + 4], at + 8, size)
        at += 8 + size + size % 2


def _true_size(found: bytes, start: int, stated: int, *, order: str) -> tuple[int, str]:
    """Return the number of bytes that are samples, and what is wrong with the stated number."""
    there = len(found) - start
    if stated > there:
        return there, (
            f"its header states {stated:,} bytes of samples, the file has {there:,}: it is cut, or was never "
            f"finished; what is there is used"
        )
    rest = found[start + stated :]
    # Some writers leave out the byte that makes the size of a chunk even.
    if len(rest) < 8 or any(_are_chunks(rest[skipped:], order) for skipped in (0, stated % 2)):
        return stated, ""
    if not stated:
        return there, f"its header states no samples, the file has {there:,} bytes; all are used"
    return stated, (
        f"its header states {stated:,} bytes of samples, and {len(rest):,} more bytes follow that belong to "
        f"no chunk; they are not used"
    )


def _are_chunks(rest: bytes, order: str) -> bool:
    """Return whether some bytes are what may follow samples: notes, each with a name and its size."""
    for chunk in _chunks(rest, order, at=0):
        if not all(32 <= letter < 127 for letter in chunk.name) or chunk.start + chunk.size > len(rest):
            return False
    return True
