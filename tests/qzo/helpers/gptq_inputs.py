"""What tests of GPTQ start from: the orders of columns, and inputs as a layer gets them."""

import torch

ORDERS = {"in order": {}, "act-order": {"act_order": True}, "static": {"act_order": True, "static_groups": True}}


def correlated(rows=512, columns=96, seed=0):
    """Inputs of which a few directions carry most of the power, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -2, columns)
    return torch.randn(rows, columns, generator=generator) @ mix.t()
