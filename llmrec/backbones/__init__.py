"""The models that recommend: causal language models with a catalog's tokens."""
