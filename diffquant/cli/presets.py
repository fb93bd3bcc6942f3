"""`diffquant presets`: which layers stay in high precision, and what a person expects of a model."""

import click

from diffquant import preset
from diffquant.cli import _talk


@click.command(short_help="List presets, or show one.")
@click.argument("name", required=False)
def COMMAND(name: str | None) -> None:
    """List presets, or show the one called NAME: layers it keeps with the reason, and defaults."""
    if name is None:
        listed = (preset.load(each) for each in preset.names())
        click.echo(_talk.table((each.name, each.family, _summary(each)) for each in listed))
    else:
        click.echo(_told(preset.load(name)))


def _summary(each: preset.Preset) -> str:
    kept = f"keeps {_talk.count(len(each.keep), 'pattern')}" if each.keep else ""
    defaults = ", ".join(f"{key} {value}" for key, value in each.defaults.items())
    return "; ".join(text for text in (", ".join(each.algorithms), kept, defaults) if text)


def _told(each: preset.Preset) -> str:
    facts = [
        ("preset", each.name),
        ("family", each.family),
        ("algorithms", ", ".join(each.algorithms) or "-"),
        ("models", ", ".join(each.models) or "the whole family"),
        *((key, str(value)) for key, value in each.defaults.items()),
    ]
    kept = [(keep.pattern, f"{keep.reason} ({keep.source})") for keep in each.keep]
    parts = [_talk.facts(facts), *(["keeps\n" + _talk.table(kept)] if kept else [])]
    return "\n\n".join(parts)
