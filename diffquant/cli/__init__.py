"""The command line: one file per subcommand, imported only when it runs.

Data goes to stdout, talk to stderr. Nothing below this package prints or exits.
"""

import os
import sys
from collections.abc import Sequence

DEBUG = "--debug"
STOPPED = 130  # what shells report for a program ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line and exit: 0 done, 1 refused or failed, 2 wrong usage."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; every refusal is told in two lines, with --debug as a traceback."""
    import click

    from diffquant.cli import _talk
    from diffquant.cli._discovered import commands
    from diffquant.errors import DiffquantError

    words = [word for word in arguments if word != DEBUG]
    group = commands(_HELP, _EPILOG)
    try:
        code = group.main(words, prog_name="diffquant", standalone_mode=False)
    except (DiffquantError, click.ClickException, OSError) as error:
        if DEBUG in arguments:
            raise
        return _talk.refuse(error)
    except (KeyboardInterrupt, click.Abort):
        _talk.say("stopped")
        return STOPPED
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; keep the interpreter's own flush quiet too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


_HELP = """Run quantized diffusion transformers of every dialect on whatever hardware is there.

\b
Start here:  diffquant generate --prompt 'red apple'
"""
_EPILOG = "Every command takes --help, and --debug for a traceback."
