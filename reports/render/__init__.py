"""A report's records as CSV and as a picture."""
