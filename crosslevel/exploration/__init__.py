"""A collection in the browser: its map, its images, and sets that are chosen by hand."""
