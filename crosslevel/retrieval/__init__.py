"""Search for images like a given one: exact among up to a million features, by an index among more."""
