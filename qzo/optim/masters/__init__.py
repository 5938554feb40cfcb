"""Masters of trained numbers: how they move, and how they are saved."""
