"""What was learnt and what was forgotten, from numbers on the host; knows no JAX."""
