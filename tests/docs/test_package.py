"""The package as a whole: quick to import, complete, and quiet."""

from __future__ import annotations

import subprocess
import sys

import sinklens as sl


def test_importing_sinklens_imports_no_heavy_library() -> None:
    code = "import sys, sinklens; sinklens.__all__; print(*[m for m in ('torch', 'transformers', 'pandas', 'plotly', "
    code += "'transformer_lens', 'numpy', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in sl.__all__:
        assert getattr(sl, name).__name__ == name
        assert name in dir(sl)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(sl, "no_such_name")
