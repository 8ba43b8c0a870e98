"""The kernels in pure PyTorch: the specification, and the path taken without a GPU."""
