"""Benchmarks of diffmax against softmax and the entmax package. README.md says how to run and read them."""
