"""Images like a given one: exact among a million features, by an index among more."""
