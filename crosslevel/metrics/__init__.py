"""Pure functions on features and labels."""
