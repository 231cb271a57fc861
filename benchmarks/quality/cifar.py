"""kNN accuracy after a short training on CIFAR-10 (JPEG): ResNet-18 at a quarter width, with and without CLD.

python benchmarks/quality/cifar.py FOLDER   # holds train/ and test/, class-per-folder
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from crosslevel.evaluation.evaluate import evaluate
from crosslevel.settings.parser import run
from crosslevel.training.train import train

sys.path.append(str(Path(__file__).parents[1]))

from shared import records


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("folder")
    parser.add_argument("--method", default="SimCLR")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0], help="of CLD, one run each")
    arguments, rest = parser.parse_known_args()
    for weight in arguments.weights:
        with tempfile.TemporaryDirectory() as folder:
            line = [f"{arguments.folder}/train", f"--method={arguments.method}", f"--epochs={arguments.epochs}"]
            line += ["--encoder.width=0.25", f"--cld.weight={weight}", f"--run={folder}/run", "--report_html=false"]
            run(train, [*line, *rest])
            figures = evaluate(f"{folder}/run", f"{arguments.folder}/train", f"{arguments.folder}/test")
        name = f"{arguments.method}{f' + CLD {weight}' if weight else ''}"
        print(f"{name}, {arguments.epochs} epochs: kNN {next(iter(figures.values()))['trained encoder']['top1']:.1f} %")


if __name__ == "__main__":
    main()
