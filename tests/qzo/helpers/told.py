"""What a command said on stderr."""

from __future__ import annotations


def errors(capsys):
    """The lines of errors that were told since it was asked last; no traceback is among the others."""
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    return [line for line in lines if line.startswith("error: ")]
