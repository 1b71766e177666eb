"""When to stop, and what to keep."""
