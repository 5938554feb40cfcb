"""Show what the bench recorded: tables, a figure and a page from a folder of JSON records.

    reports.tables("results/llama2-13b")                    # Markdown, for a terminal
    reports.write("results/llama2-13b", ["md", "png"])      # tables.md and memory.png in that folder

Reads JSON only and imports no torch; every number comes from a record.
"""

from reports.errors import ReportError
from reports.files import DEFAULT_FORMATS, FORMATS, tables, write

__all__ = ["DEFAULT_FORMATS", "FORMATS", "ReportError", "tables", "write"]
