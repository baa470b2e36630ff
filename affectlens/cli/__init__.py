"""The command line: one function a verb, tables as the files between them.

Exit codes: 0 done, 1 a clear error, 2 usage, 130 interrupted.
"""

import sys

from affectlens.errors import AffectlensError
from affectlens.html import plain


def main() -> None:
    """Run the command line; an error of ours is one line on standard error."""
    from affectlens.cli.verbs import app

    try:
        app(standalone_mode=False)
    except AffectlensError as error:
        _stop(f"error: {' '.join(plain_lines(str(error)))}", 1)
    except OSError as error:  # a full disk, a folder that can't be written
        _stop(f"error: {plain(error)}", 1)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except Exception as error:  # typer's and click's own usage errors carry their exit code
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        show = getattr(error, "show", None)
        if show is not None:
            show()
        sys.exit(code)


def plain_lines(text: str) -> list[str]:
    """Make the lines of a message fit for a terminal."""
    return [plain(line) for line in text.splitlines()]


def _stop(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)
