"""Everything on a CUDA device."""
