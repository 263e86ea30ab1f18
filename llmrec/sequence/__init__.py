"""Sequence models: item representations, events, an encoder and scores, trained and served as one."""
