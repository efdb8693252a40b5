"""The machine code of the kernels, read and walked without a GPU."""
