"""Where the memory of fine-tuning goes: measured on a GPU, measured on a CPU, or simulated without either."""
