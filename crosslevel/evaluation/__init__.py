"""Evaluation of features: the protocols, and runs side by side."""
