"""A model's folder, whatever its format: inspected, loaded, saved, and written back with tuned scales."""
