"""BatchNorm statistics of averaged weights: estimated anew over batches of their own, leaving no trace in the run."""
