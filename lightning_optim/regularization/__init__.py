"""Regularization: penalties on weights, proximal steps, and dropout."""
