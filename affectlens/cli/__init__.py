"""The command line: one function a verb, tables as the files between them.

Exit codes: 0 done, 1 a clear error, 2 usage, 130 interrupted.
"""

from affectlens.cli.process import interrupted, leave, listen


def main() -> None:
    """Run the command line; an error of ours is one line on standard error."""
    try:
        listen()
        # Only now, so that Ctrl-C is answered meanwhile as well.
        from affectlens.cli.process import run

        run().leave()
    except BaseException:
        if not interrupted():
            raise
        leave()
