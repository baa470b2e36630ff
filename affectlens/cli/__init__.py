"""The command line: one function per verb; saved tables pass results from one verb to the next.

    process: run ──▶ verbs (typer) ──▶ inspecting, modifying, or the library ──▶ text ──▶ the terminal

Exit codes: 0 done, 1 a clear error, 2 usage, 130 interrupted.
"""

from affectlens.cli.process import interrupted, leave, listen


def main() -> None:
    """Run the command line; an error is one line on standard error."""
    try:
        listen()
        # Imported only now, so that Ctrl-C works during the import too.
        from affectlens.cli.process import run

        run().leave()
    except BaseException as error:
        if not interrupted():
            raise
        leave(error)
