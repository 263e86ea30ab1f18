"""What items are to a sequence model: rows of a table, texts, semantic IDs, hashes."""
