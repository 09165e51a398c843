"""A training step in PyTorch, for an interpreter that has that and not jaxsd: `bench step --against=PYTHON`."""
