"""Weights to codes: the sizes that they must have, rounding to nearest, and GPTQ."""
