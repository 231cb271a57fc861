"""Labels for images, learned from labelled ones, and how reliable they are."""
