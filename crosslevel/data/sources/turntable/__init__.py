"""Turntable: generated images of objects that turn, correlated and long-tailed."""
