"""Search: target vectors in, the best rows per query out. Knows tensors, neither models nor files."""
