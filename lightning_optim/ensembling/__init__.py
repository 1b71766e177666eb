"""Combine several models into one prediction."""
