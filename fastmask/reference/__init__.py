"""Pure-PyTorch twins of the kernels: the specification, and the path taken without a GPU."""
