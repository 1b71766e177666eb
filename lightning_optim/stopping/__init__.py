"""Stop training when a metric stops improving, and keep the best weights."""
