"""Every operation in plain PyTorch: what is correct, in any dtype up to float64, and what runs where there is no GPU.

Values are rounded where the published models round (transformers' Granite): after the norm and again after its weight, after
each product of the rotation, after silu, after the residual multiplier. Signatures equal those of `granite_kernels.kernels`.
"""
