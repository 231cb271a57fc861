"""Search for better settings, without labels."""
