"""From images to batches: in memory, through worker processes, or as a stream."""
