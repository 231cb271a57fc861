"""The half of a CLIP that reads words, for queries in words."""
