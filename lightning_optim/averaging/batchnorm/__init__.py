"""Estimate the statistics of BatchNorm anew for averaged weights, without a trace in the training run."""
