"""What fine-tuning needs: a trainer, its batches and loss, ranking metrics on the way, checkpoints that are whole."""
