"""Training without labels, from a source to a run's folder."""
