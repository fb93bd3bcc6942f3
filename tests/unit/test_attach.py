"""What diffusers is given, and how it is kept from talking."""

import diffusers
import pytest
import transformers

from diffquant.attach import hush

LIBRARIES = (diffusers, transformers)


def test_libraries_report_errors_only_and_show_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [library.utils.logging.get_verbosity() for library in LIBRARIES]
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    try:
        for library in LIBRARIES:
            library.utils.logging.set_verbosity_info()
            library.utils.logging.enable_progress_bar()
        hush()
        levels = [library.utils.logging.get_verbosity() for library in LIBRARIES]
        assert levels == [diffusers.logging.ERROR, transformers.logging.INFO], "as was asked"
        assert not any(library.utils.logging.is_progress_bar_enabled() for library in LIBRARIES)
    finally:
        for library, level in zip(LIBRARIES, before, strict=True):
            library.utils.logging.set_verbosity(level)
            library.utils.logging.enable_progress_bar()
