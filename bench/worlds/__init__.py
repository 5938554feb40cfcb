"""Where a step is run (on a GPU, on a CPU, or simulated), and in which process."""
