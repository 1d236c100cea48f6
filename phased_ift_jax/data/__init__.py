"""From files to packed batches of numpy arrays; knows no JAX."""
