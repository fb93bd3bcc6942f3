"""Presets: which layers stay in high precision, with the evidence; and what a person expects.

Installed as `diffquant.presets`; read by `diffquant.preset`.
"""

if __name__ != "diffquant.presets":
    raise ImportError(f"import diffquant.presets, not {__name__!r}")
