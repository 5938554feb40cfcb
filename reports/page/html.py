"""report.html: one self-contained page, the figure inside, nothing loaded from a network."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reports.tables.document import Document


def to_html(document: Document, png: bytes) -> str:
    """The report and its figure as one HTML page."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.get_template("page.html")
    return template.render(document=document, figure=base64.b64encode(png).decode())
