"""Ranking: the probabilities that a user clicks, likes or buys a candidate (CTR), after what the user did before."""
