"""Images: where they come from, which part of them, and how batches of them are read."""
