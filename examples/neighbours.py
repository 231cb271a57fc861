"""The nearest neighbours of an image, by the features of a run.

python examples/neighbours.py RUN IMAGES QUERY
"""

import sys

import numpy as np

import crosslevel


def neighbours(run: str, images: str, query: str, count: int = 5) -> list[tuple[str, float]]:
    """The most similar of the images: path and cosine, the most similar first."""
    table = crosslevel.embed(run, images, quiet=True)
    mine = crosslevel.load(run).transform(query)[0]
    unit = table.features / np.linalg.norm(table.features, axis=1, keepdims=True)
    cosine = unit @ (mine / np.linalg.norm(mine))
    return [(table.paths[i], float(cosine[i])) for i in np.argsort(-cosine)[:count]]


if __name__ == "__main__":
    for path, similarity in neighbours(*sys.argv[1:]):
        print(f"{similarity:.3f}  {path}")
