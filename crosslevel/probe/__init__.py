"""Learning on frozen or fine-tuned features: what a representation is good for."""
