"""Features of images: computed, kept, and written as a table."""
