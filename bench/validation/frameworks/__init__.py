"""What frameworks and older libraries did in a step where the installed ones do something else, from their source."""
