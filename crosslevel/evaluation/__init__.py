"""What features are good for: the protocols, and runs side by side."""
