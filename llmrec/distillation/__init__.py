"""Distillation: smaller students of a trained recommender, which of its layers matter, and what size buys."""
