"""Configuration files of training tools, as their users publish them, read as recipes: one file a tool."""

from bench.cases.recipes.files.reading import ReadRecipe, read_recipe

__all__ = ["ReadRecipe", "read_recipe"]
