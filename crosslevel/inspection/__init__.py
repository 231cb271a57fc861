"""What is in a collection: sizes, damage, duplicates, the long tail, and what to do about it."""
