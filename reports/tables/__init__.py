"""The tables of a report, each computed from records alone."""
