"""Utilities for all packages; they import none of them."""
