"""One prediction out of many models."""
