"""The search's inner loops over static shapes: in torch, which defines them, and in Triton where there is a GPU."""
