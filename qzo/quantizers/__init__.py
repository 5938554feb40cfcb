"""A whole model from 16 bits to codes: round-to-nearest, GPTQ on calibration text, AQLM."""
