"""A group of commands whose members are the modules of a package."""

from importlib import import_module
from typing import Any

import click

from diffquant.errors import UsageError, meant
from diffquant.plugins import Registry

SUBCOMMANDS: Registry[click.Command] = Registry("diffquant.cli", "COMMAND")


def commands(help: str, epilog: str) -> "Discovered":
    """`diffquant` itself."""
    group = Discovered(
        SUBCOMMANDS,
        name="diffquant",
        help=help,
        epilog=epilog,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    return click.version_option(package_name="diffquant")(group)


class Discovered(click.Group):
    """Imports only the one module whose command runs; `--help` imports them all."""

    def __init__(self, registry: Registry[click.Command], **settings: Any) -> None:
        super().__init__(**settings)
        self.registry = registry

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # A command line without a word is a question about what there is.
        return super().parse_args(ctx, args or ["--help"])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name.replace("_", "-") for name in self.registry.names()]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # As click does, but for long names: theirs is one line too.
        names = self.list_commands(ctx)
        longest = max(map(len, names))
        limit = formatter.width - 6 - longest
        rows = [(name, self.get_command(ctx, name).get_short_help_str(limit)) for name in names]
        with formatter.section("Commands"):
            formatter.write_dl(rows, col_max=longest)

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        module = name.replace("-", "_")
        if module not in self.registry.names():
            raise UsageError(
                f"there is no command {name!r}", hint=meant(name, self.list_commands(ctx))
            )
        found = getattr(import_module(f"{self.registry.package}.{module}"), self.registry.attribute)
        assert isinstance(found, click.Command)
        return found
