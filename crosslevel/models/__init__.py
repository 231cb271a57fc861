"""The networks: backbone, projection heads, normalization over devices, export."""
