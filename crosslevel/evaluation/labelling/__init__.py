"""Labels for images, from labelled ones, and how far they can be trusted."""
