"""Evidence from a GPU in ten minutes: what `make gpu` runs, part by part, each into a file of its own."""
