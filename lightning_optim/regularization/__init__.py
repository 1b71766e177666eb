"""Regularize: penalties on weights, proximal steps, dropout, and terms of the loss that need the batch."""
