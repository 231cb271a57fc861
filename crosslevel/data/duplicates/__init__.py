"""Copies and near-duplicates among images, from pixels alone: found, graded, named."""
