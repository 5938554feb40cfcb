"""The generation config beside a model: which tokens end a text, and how the next one is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qzo.errors import QzoError
from qzo.files.folder import one_line, read_json
from qzo.quiet import quiet_libraries

GENERATION = "generation_config.json"


def read_generation(folder: Path) -> Any:
    """The generation config of a model's folder as transformers has it; None where there is none.

    Raises QzoError for one that is damaged, which transformers takes for none.
    """
    file = folder / GENERATION
    if not file.is_file():
        return None
    from transformers import GenerationConfig

    try:
        content = read_json(file)
        with quiet_libraries():
            return GenerationConfig.from_dict(content)
    except Exception as error:  # of many kinds; all of them mean that it cannot be used
        cause = one_line(error)
        if isinstance(error, QzoError):  # another remedy is to do without it
            cause = cause.removeprefix(str(file)).strip(": ").rpartition("; ")[0]
        raise QzoError(f"{file}: {cause}; mend it, or remove it") from error
