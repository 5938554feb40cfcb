"""Page and picture, both written or neither."""

from __future__ import annotations

from pathlib import Path

from qzo.durable import replace_file


def write_both(page: Path, text: str, picture: bytes | None, name: str) -> None:
    """Write the page and, beside it under `name`, the picture where there is one; on an error both are what they were.

    The page is on its way to the disk before the picture takes its place, so a full disk is known by then.

    Raises QzoError where one of them cannot be written.
    """

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")
        if picture is not None:
            replace_file(page.with_name(name), lambda file: file.write_bytes(picture))

    replace_file(page, write)
