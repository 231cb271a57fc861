"""Better settings, found without labels."""
