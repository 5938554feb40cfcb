"""AWQ: the layer on the packed tensors of AutoAWQ."""
