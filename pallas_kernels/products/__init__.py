"""What the products of a few rows have in common, whatever their weights are stored as.

around    what a launch does before and after its products, and its XLA form
inputs    a block's activations in shared memory, normed on the way
sums      what the warps and blocks of a cluster have summed, added up and written
"""
