"""Detection with Faster R-CNN on the encoder."""
