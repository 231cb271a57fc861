"""A collection in the browser: its map, its images, and sets selected by hand."""
