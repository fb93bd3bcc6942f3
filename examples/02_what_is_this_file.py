"""Ask a checkpoint what it is, from its header alone: format, evidence, layers, audit."""

import sys

import diffquant

source = sys.argv[1] if len(sys.argv) > 1 else "emoji_flux_modelopt_fp8"

found = diffquant.inspect(source).to_json()
print(f"{found['format']} for {found['family']}: {found['evidence'][0]}")
for layer in found["layers"][:3]:
    print(f"  {layer['path']} {layer['shape']} {layer['encoding']['name']} {layer['activation']}")
print("whole" if found["audit"]["ok"] else found["audit"]["problems"])
