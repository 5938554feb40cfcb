"""How a method with a backward pass trains, as data: a recipe, the table's own, and those of options and files."""
