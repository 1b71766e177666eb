"""Averages during a fit."""
