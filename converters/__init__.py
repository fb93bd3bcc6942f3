"""File to file converters, installed as `diffquant.converters`: one file each.

A converter is a function, and a click command called `main` on top of it. `diffquant convert NAME`
finds it by its module's name; `python -m diffquant.converters.NAME` runs the same command.
"""

if __name__ != "diffquant.converters":
    raise ImportError(f"import diffquant.converters, not {__name__!r}")
