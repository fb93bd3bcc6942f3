"""`diffquant convert NAME`: one file → file rewriter per module of `diffquant.converters`."""

import click

from diffquant.cli._discovered import Discovered
from diffquant.plugins import Registry

CONVERTERS: Registry[click.Command] = Registry("diffquant.converters", "main")

COMMAND = Discovered(
    CONVERTERS,
    name="convert",
    short_help="Rewrite weights from one form into another.",
    help="Rewrite weights from one form into another. `diffquant convert NAME --help` tells more.",
)
