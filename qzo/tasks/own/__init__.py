"""A user's own data as a task: files of any usual kind, recognised by their fields, split, encoded and scored."""
