"""Connect policies to a running Trainer: hooks, steps, state in checkpoints. Callbacks import from here."""
