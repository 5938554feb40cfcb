"""Long experiments, each the record behind a page of reports."""
