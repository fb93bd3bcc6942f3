"""Build a transformer in MXFP8, MXFP4 or INT8 from plain weights, in the dialect of a choice of tools.

    --encoding    weights                                  inputs, taken from each input
    mxfp8         e4m3 in groups of 32 under 2^e           mxfp8
    mxfp4         e2m1 in groups of 32 under 2^e           mxfp4
    int8          one signed byte, one scale per row       none: weight-only (int8 per token with w8a8)

    --dialect     what is written
    modelopt            a component folder that diffquant, ModelOpt's own loaders and SGLang read
    comfy               one .safetensors file under the original names, for ComfyUI
    compressed_tensors  a component folder in vLLM's format

Which layers stay is the family's preset and what was typed. What a dialect has no word for is refused
before anything is written.
"""

import click

from diffquant.converters._command import ConverterCommand
from diffquant.converters._contract import Converted, convert, plain, quantized, tell
from diffquant.converters._options import (
    Choosing,
    Writing,
    choosing_options,
    writing_options,
)
from diffquant.exporting import writable

#: Value of --encoding -> what `--quantization` calls the same thing.
SCHEMES = {"mxfp8": "mxfp8", "mxfp4": "mxfp4", "int8": "int8_weight_only", "w8a8": "int8"}
DIALECTS = [name for name in ("modelopt", "comfy", "compressed_tensors") if name in writable()]


def build(
    source: str,
    writing: Writing,
    *,
    encoding: str,
    dialect: str = "modelopt",
    choosing: Choosing = Choosing(),  # noqa: B008 - frozen
) -> Converted:
    """Write the transformer that `source` names, quantized to `encoding`.

    Raises what `_contract.plain`, `quantized` and `convert` raise.
    """
    truth = plain(source)
    return convert(quantized(truth, SCHEMES[encoding], choosing), truth, dialect, writing)


@click.command(cls=ConverterCommand, short_help="MXFP8, MXFP4 or INT8 of plain BF16.")
@click.option("--from-bf16", required=True, metavar="SOURCE", help="Plain weights to quantize.")
@click.option("--encoding", required=True, type=click.Choice(list(SCHEMES)))
@click.option("--dialect", type=click.Choice(DIALECTS), default="modelopt", show_default=True)
@choosing_options
@writing_options
def main(from_bf16: str, encoding: str, dialect: str, choosing: Choosing, writing: Writing) -> None:
    """Quantize plain weights to MXFP8, MXFP4 or INT8.

    Prints what was done as JSON, and the layers that lost most on stderr.
    """
    done = build(from_bf16, writing, encoding=encoding, dialect=dialect, choosing=choosing)
    tell(done.report, done.to_json(), writing)


if __name__ == "__main__":
    main()
