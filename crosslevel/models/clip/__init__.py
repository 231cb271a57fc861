"""The text tower of a CLIP, for queries in words."""
