"""The content of a collection: sizes, damage, duplicates, the long tail, and settings for it."""
