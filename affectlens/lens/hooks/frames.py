"""Ask which Python calls are running: an interrupt ends a call without a hook that would say so."""

import sys
from collections.abc import Callable
from types import FrameType


def nearest(wanted: Callable[[FrameType], bool]) -> FrameType | None:
    """Return the innermost running call that is wanted."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not wanted(frame):
        frame = frame.f_back
    return frame


def runs(frame: FrameType | None) -> bool:
    """Return whether a call is among those that are running in this thread."""
    return frame is not None and nearest(lambda one: one is frame) is frame
