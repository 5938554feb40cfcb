"""The optimizers: QZO and MeZO on plain tensors, their random directions, estimates and update rules."""
