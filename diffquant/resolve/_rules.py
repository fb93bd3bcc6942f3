"""The numbered rules as sentences, and the log of those that fired."""

from collections.abc import Mapping
from dataclasses import dataclass

#: The format of files that are not quantized.
PLAIN_FORMAT = "diffusers"

#: The sentence each rule logs when it fires.
RULES: Mapping[str, str] = {
    "1": "the base pipeline is {origin!r}",
    "1b": "no --model-path was typed: the base pipeline is the bundled {origin!r}",
    "1c": "no override was typed: {component} is the bundled {origin!r}",
    "2": "{flag} gives {component} its own config and weights: {origin!r}",
    "2b": "{flag} gives {component} its settings: {origin!r}, a {class_name}",
    "3": "{flag} gives {component} its weights: {origin!r}; its config stays the base's",
    "3b": "{flag} names a weights file, so the config of {component} stays the base's",
    "3c": "{flag} gives {component} its weights: {origin!r}; its config comes from {config!r}",
    "4": "only {component} is overridden; {other} stays the base's (to replace it: {flag})",
    "4c": "{component} was held against the base and is that expert, not {other}",
    "4d": "whether {component} and {other} are in their places is unknown: the base's weights are not here",
    "4b": "{origin!r} holds {component} too, and its config agrees with the base",
    "4e": "{origin!r} keeps {component} in {folder!r}; its config stays the base's",
    "5": "{origin!r} is weights of the family {family}; its base pipeline is {base!r}",
    "5b": "the base stores {component} quantized: {evidence}",
    "6": "of several weight files in {origin!r} {name!r} is taken",
    "7": "the name {name!r} promises SVDQuant {precision} of rank {rank}; the tensors must agree",
    "7b": "the flags promise SVDQuant {precision} of rank {rank}; the tensors must agree",
    "8": "{component} is quantized to {name} while loading",
    "8b": "{component} is {name} as --quantization says: {evidence}",
    "8c": "{component} is {found} and becomes {name} while loading: it is quantized twice",
    "9": "--quantization-ignored-layers keeps {count} layers of {component}, first {first!r}",
}


@dataclass(frozen=True, slots=True)
class Fired:
    """A rule that decided something; `loud` ones deserve a person's attention."""

    rule: str
    sentence: str
    loud: bool = False


class Log(list[Fired]):
    """Rules in the order they fired."""

    def fire(self, rule: str, *, loud: bool = False, **values: object) -> None:
        self.append(Fired(rule, RULES[rule].format(**values), loud))
