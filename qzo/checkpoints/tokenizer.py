"""The tokenizer beside a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzo.errors import QzoError, is_failure
from qzo.files.bounds import check_folder
from qzo.files.folder import one_line
from qzo.files.settings import check_no_run, is_gguf
from qzo.formats.gguf.files import tokenizer_class
from qzo.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: str | os.PathLike[str], revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of what `load` loads, with the same arguments. Raises QzoError where there is none."""
    from transformers import AutoTokenizer

    path = Path(source)
    place, options = (path.parent, {"gguf_file": path.name}) if is_gguf(path) else (source, {})
    check_folder(path.parent if options else path)
    kind: Any = tokenizer_class(path) if options else None  # a damaged file is told here
    try:
        with quiet_libraries():
            if kind is not None:
                return kind.from_pretrained(str(place), **options)
            loaded: Any = AutoTokenizer.from_pretrained(
                str(place), revision=revision, trust_remote_code=False, **options
            )
            if not isinstance(loaded.model_max_length, int | float):  # which it compares lengths with, later on
                raise ValueError(f"model_max_length in tokenizer_config.json is {loaded.model_max_length!r}, no number")
            return loaded
    except BaseException as error:  # as in _from_pretrained, and panics
        if not is_failure(error):
            raise
        if not options:
            check_no_run(path)
        raise QzoError(
            f"{source} has no tokenizer that loads: {one_line(error)}; copy the files of one beside the model"
        ) from error
