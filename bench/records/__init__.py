"""What a case leaves on disk: its record, the files, their summary, and their comparison."""
