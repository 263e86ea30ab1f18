"""What a sequence model is trained with: softmax over all items or sampled ones, and binary cross-entropies."""
