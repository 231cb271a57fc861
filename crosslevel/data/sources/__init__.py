"""One file for each kind of source: folders, packs, data sets by name, containers, videos, annotations."""
