"""How an image is decoded: formats told by content, complaints of decoders, and how much memory one may take."""
