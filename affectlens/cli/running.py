"""Run a verb: keep the libraries quiet, parse the command line, and turn whatever happens into an end."""

import io
import logging
import os
import sys
import warnings

from affectlens.cli.ending import DEBUG, Ending, ending


def run() -> Ending:
    """Run the verb that the command line asks for, and say how that ended."""
    try:
        _prepare()
        from typer.main import get_command

        from affectlens.cli.verbs import app

        # Not by calling the app: it has answers of its own to Ctrl-C and to a pipe that nobody reads.
        with get_command(app).make_context("affectlens", sys.argv[1:]) as context:
            context.command.invoke(context)
        sys.stdout.flush()
    except BaseException as error:
        return ending(error)
    return Ending(0)


def _prepare() -> None:
    """Let no library speak beside us, and no character or closed stream stop what is printed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if DEBUG in os.environ:
        return
    logging.disable()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:  # else somebody asked for them
        warnings.simplefilter("ignore")
