"""Weights that an encoder starts from: by name or from a file, and which of them are trained."""
