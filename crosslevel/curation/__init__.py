"""What of a collection to keep or to label, without labels."""
