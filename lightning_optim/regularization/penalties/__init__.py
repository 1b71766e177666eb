"""Penalize weights: terms of the loss, each as a value and as a gradient in closed form."""
