"""Cross-level discrimination (CLD): the group branch, and the local grouping that it rests on."""
