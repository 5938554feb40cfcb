"""The files of a report: Markdown, CSV, HTML and a picture."""
