"""Pure torch: all that a policy may import."""
