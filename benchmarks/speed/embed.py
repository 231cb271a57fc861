"""Embedding 10,000 small files from disk, beside the bare encoder on ready tensors and decoding alone, in alternation.

python benchmarks/speed/embed.py FOLDER   # about 10,000 images
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import torch

from crosslevel import Encoder, load_encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.decode import decode
from crosslevel.data.loaders.batches import EvalBatches
from crosslevel.data.open import open_images
from crosslevel.features.embed import embed
from crosslevel.features.extract import normalize
from crosslevel.utils.device import choose

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import dated, median


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=9, help="of the narrow network; the other has a third")
    arguments = parser.parse_args()
    print(dated())
    count = len(open_images(arguments.folder))
    print(f"one file decoded, without reading it: {decoding(arguments.folder):.0f} us of the processor")
    for width, times in ((0.25, arguments.rounds), (1.0, max(1, arguments.rounds // 3))):
        with tempfile.TemporaryDirectory() as folder:
            run = Encoder("resnet18", True, width).save(Path(folder) / "encoder.safetensors")
            rounds = [one_round(run, arguments.folder, count) for _ in range(times + 1)][1:]
        whole, bare, decode = (count / median([r[i] for r in rounds]) for i in range(3))
        ratios = [max(encoder, decoding) / total for total, encoder, decoding in rounds]
        print(
            f"ResNet-18 x {width}: embed {whole:,.0f} images/s, encoder alone {bare:,.0f}, decoding alone "
            f"{decode:,.0f}; embed / the slower of both {median(ratios):.2f}"
        )


def decoding(folder: str, files: int = 400, rounds: int = 12) -> float:
    """Microseconds of the processor to decode one of the first files: the best round."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())[:files]
    data = [path.read_bytes() for path in paths]
    spent = []
    for _ in range(rounds):
        copies = [bytearray(one) for one in data]
        began = time.process_time()
        for copy in copies:
            decode(copy, "image")
        spent.append(time.process_time() - began)
    return 1e6 * min(spent) / len(data)


def one_round(run: Path, folder: str, count: int) -> tuple[float, float, float]:
    """Seconds of embedding, of the encoder alone, of decoding alone."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        embed(str(run), folder, f"{out}/features.parquet", precision="auto")  # as the encoder alone
        whole = time.perf_counter() - began
    began = time.perf_counter()
    for _ in EvalBatches(open_images(folder), 256, 32, bad_files=BadFiles()):
        pass
    decode = time.perf_counter() - began
    encoder, hardware = load_encoder(run).to(memory_format=torch.channels_last), choose()
    ready = normalize(torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8), encoder.view)
    began = time.perf_counter()
    with torch.inference_mode(), hardware.autocast():
        for _ in range(count // 256):
            encoder(ready)
    return whole, (time.perf_counter() - began) * count / (count // 256 * 256), decode


if __name__ == "__main__":
    main()
