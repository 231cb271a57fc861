"""How an image is decoded: formats recognized by content, messages of decoders, and a limit on memory."""
