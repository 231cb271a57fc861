"""Columns of a table beside path, label and feature."""
