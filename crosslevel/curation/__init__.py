"""Which images of a collection to keep or to label, chosen without labels."""
