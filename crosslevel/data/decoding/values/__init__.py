"""Files of values that are no bytes of a picture by themselves: arrays, bands of TIFF, and what becomes of them."""
