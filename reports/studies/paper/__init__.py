"""The paper's printed memory beside simulations of its protocol."""
