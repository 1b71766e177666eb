"""Read, average, select and describe checkpoints, without a Trainer."""
