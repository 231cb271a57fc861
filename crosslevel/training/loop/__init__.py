"""The loop around the training step: steps, log, checkpoints, and the watch for collapses."""
