"""Small films with a picture of four colours and a tone, written with av; tests that use them need it."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

RATE, LENGTH = 16_000, 12_000  # Hz, samples
CORNERS = np.zeros((64, 96, 3), np.uint8)
CORNERS[:32, :48], CORNERS[:32, 48:], CORNERS[32:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def tone(channels: int = 1) -> np.ndarray:
    """Three quarters of a second of a sine of half the largest value, the second channel silent."""
    wave = np.sin(np.arange(LENGTH) / 5) * 2**14
    return np.stack([wave, np.zeros(LENGTH)][:channels], axis=1).astype(np.int16)


def film(
    path: Path, *, sound: bool = True, pictures: bool = True, codec: str = "aac", channels: int = 1
) -> Path:
    """Write ten frames in a second, and a tone beside them."""
    import av

    layout = "stereo" if channels == 2 else "mono"
    with av.open(str(path), "w") as out:
        shown: Any = out.add_stream("mpeg4", rate=10) if pictures else None
        if shown is not None:
            shown.width, shown.height, shown.pix_fmt = 96, 64, "yuv420p"
        heard: Any = out.add_stream(codec, rate=RATE, layout=layout) if sound else None
        if shown is not None:
            for _ in range(10):
                out.mux(shown.encode(av.VideoFrame.from_ndarray(CORNERS, format="rgb24")))
            out.mux(shown.encode())
        if heard is not None:
            frame = av.AudioFrame.from_ndarray(tone(channels).reshape(1, -1), format="s16", layout=layout)
            frame.sample_rate, frame.pts = RATE, 0
            size = 1024 if codec == "aac" else None
            cut = av.AudioResampler(format=heard.format.name, layout=layout, rate=RATE, frame_size=size)
            for one in (*cut.resample(frame), *cut.resample(None)):
                out.mux(heard.encode(one))
            out.mux(heard.encode())
    return path


def laid(source: Path, path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Copy an MP4 with another display matrix (its upper left 2 × 2), as a turned phone writes it."""
    content = bytearray(source.read_bytes())
    # ISO 14496-12, 8.3.2: the matrix is 40 bytes into the header of the first track, which is the film.
    start = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (one << 16 for one in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(content))
    return path
