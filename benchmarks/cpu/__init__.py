"""The operator on a CPU."""
