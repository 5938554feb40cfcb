"""Evidence from a GPU in twelve minutes: what `make gpu` runs, part by part, each into a file of its own."""
