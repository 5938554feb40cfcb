"""How far predicted memory is from what was measured."""
