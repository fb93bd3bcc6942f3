"""A converter's command: run by itself it refuses like the rest of the house, in two lines."""

import sys
from typing import Any

import click

from diffquant.errors import DiffquantError


class ConverterCommand(click.Command):
    """For `@click.command(cls=...)`. Under `diffquant convert`, errors pass through to its caller."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        try:
            return super().main(*arguments, **settings)
        except DiffquantError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
