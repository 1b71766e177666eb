"""Stop training, and keep the best weights."""
