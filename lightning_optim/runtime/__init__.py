"""The Trainer's side: all that a callback may import."""
