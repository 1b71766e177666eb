"""Averages of weights, one rule a file: what an update does with the average and the new weights."""
