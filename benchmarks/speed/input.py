"""Images a second of every source alone, as two 224 x 224 views, beside the encoder that they feed, in alternation.

The sources show the same photographs of 500 x 375 pixels: generated, of photographic statistics (CIFAR images
enlarged, with noise of several scales), as JPEG of quality 90. torchvision's pipeline is ImageFolder with a transform
that draws two RandomResizedCrop, in a DataLoader; ours is `TrainBatches` with the crops of `Views`. On a GPU there is
a row more: what its JPEG decoder (nvJPEG, by torchvision) does alone, without crops and without looking for damage.

python benchmarks/speed/input.py --cifar FOLDER_OF_SMALL_IMAGES
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from crosslevel import Encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.open import open_images
from crosslevel.data.pack import pack
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import dated, median, wait

SIZE, BATCH = 224, 64


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("--cifar", required=True, help="a folder of small images that the photographs are made of")
    parser.add_argument("--photos", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--encoder", default="resnet18")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, workers = Path(folder), arguments.workers
        size = photographs(root / "photos", open_images(arguments.cifar), arguments.photos)
        print(dated())
        print(f"{arguments.photos} JPEG files of 500 x 375 pixels, {size / 1e3:.0f} kB each; {workers} workers")
        epochs = sources(root, workers)
        seconds = in_turns(epochs, arguments.rounds)
        by_gpu = decoded_by(root / "photos", "cuda") if torch.cuda.is_available() else None
    for name, rounds in seconds.items():
        ratio = median([r / s for r, s in zip(seconds["torchvision"], rounds, strict=True)])
        print(f"{name:<44} {arguments.photos / median(rounds):>8,.0f} images/s  {ratio:>6.2f} x torchvision")
    if by_gpu is not None:
        print(f"{'decoded on the GPU (nvJPEG), nothing else':<44} {by_gpu:>8,.0f} images/s")
    print(
        f"{arguments.encoder + ' forward, backward, two views':<44} {encoder_speed(arguments.encoder):>8,.1f} images/s"
    )


def decoded_by(photos: Path, device: str, rounds: int = 3) -> float:
    """Images a second of JPEG files that are in memory, decoded in batches on ``device``; the first round warms up."""
    files = [read_file(str(file)) for file in sorted(photos.rglob("*.jpg"))]
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for first in range(0, len(files), BATCH):
            decode_jpeg(files[first : first + BATCH], mode=ImageReadMode.RGB, device=device)
        wait()
        seconds.append(time.perf_counter() - began)
    return len(files) / median(seconds[1:])


def sources(root: Path, workers: int) -> dict[str, Callable[[], object]]:
    """Functions that read every image once, by name; their workers already run when they are timed."""
    photos, packed, square = root / "photos", root / "packed", root / "square"
    squares(photos, square)
    with contextlib.redirect_stdout(io.StringIO()):
        pack(str(photos), str(packed), workers=workers)
        pack(str(square), f"{square}.packed", workers=workers)
    epochs: dict[str, Callable[[], object]] = {
        "torchvision": drained(torchvision_loader(photos, workers)),
        "JPEG files": drained(ours(open_images(photos), workers)),
        "packed": drained(ours(open_images(packed), workers)),
        "packed, square: batches of whole images": drained(ours(open_images(f"{square}.packed"), workers)),
    }
    for name, make in (("shards", shards), ("parquet", parquet)):
        epochs[name] = drained(ours(open_images(make(photos, root)), workers))
    return epochs


def in_turns(epochs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each epoch, round by round; the first round starts the workers and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for n in range(rounds + 1):
        for name, epoch in epochs.items():
            began = time.perf_counter()
            epoch()
            if n:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ours(images: Images, workers: int) -> TrainBatches:
    views = Views("mocov2", SIZE)
    crops = None if isinstance(images, InMemoryImages) else views.crops
    return TrainBatches(images, BATCH, seed=0, bad_files=BadFiles(), crops=crops, workers=workers)


def torchvision_loader(photos: Path, workers: int) -> DataLoader:
    # Bytes to a tensor first and then the crop: in that order torchvision is faster than the other way round.
    first, view = v2.ToImage(), v2.RandomResizedCrop(SIZE, antialias=True)

    def two(image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = first(image)
        return view(pixels), view(pixels)

    folder = ImageFolder(str(photos), two)
    return DataLoader(
        folder, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0, multiprocessing_context="fork"
    )


def drained(batches: Iterable[object]) -> Callable[[], object]:
    def epoch() -> int:
        return sum(1 for _ in batches)

    return epoch


def photographs(root: Path, small: Images, count: int) -> float:
    """Write ``count`` files in ten folders; their mean size in bytes."""
    rng, sizes = np.random.default_rng(0), []
    for n in range(count):
        pixels = small[int(rng.integers(len(small)))][0].permute(1, 2, 0).numpy()
        photo = np.asarray(Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC)).astype(np.float32)
        grain = np.zeros((375, 500), np.float32)
        for step in (1, 2, 4, 8):
            grain += noise(rng, step)
        photo = photo + grain[..., None]
        file = root / str(n % 10) / f"{n:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(file, quality=90)
        sizes.append(file.stat().st_size)
    return float(np.mean(sizes))


def noise(rng: np.random.Generator, step: int) -> np.ndarray:
    """Noise of the grain ``step``, stronger the coarser, as in natural images."""
    coarse = rng.normal(0, 1, (375 // step + 1, 500 // step + 1)).astype(np.float32)
    return 6 * step**0.5 * np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC))


def squares(photos: Path, root: Path) -> None:
    """The centre squares of the photographs, 256 pixels, in a folder of their own."""
    for file in photos.rglob("*.jpg"):
        target = root / file.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(file)
        image.resize((341, 256), Image.Resampling.BILINEAR).crop((42, 0, 298, 256)).save(target, quality=90)


def shards(photos: Path, root: Path) -> str:
    """The photographs in two tar files, as WebDataset names members."""
    import tarfile

    files = sorted(photos.rglob("*.jpg"))
    (root / "tars").mkdir()
    for part in range(2):
        with tarfile.open(root / "tars" / f"photos-{part:06}.tar", "w") as tar:
            for file in files[part::2]:
                tar.add(file, f"{file.stem}.jpg")
    return str(root / "tars" / "photos-{000000..000001}.tar")


def parquet(photos: Path, root: Path) -> str:
    """The photographs in a Parquet file with an image column, in row groups of 100."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(photos.rglob("*.jpg"))]
    pq.write_table(pa.table({"image": rows}), root / "photos.parquet", row_group_size=100)
    return str(root / "photos.parquet")


def encoder_speed(name: str, repeats: int = 3) -> float:
    """Images a second through the encoder, two views each, forward and backward, at the best precision there is."""
    hardware, encoder = choose(), Encoder(name, False).to(memory_format=torch.channels_last)
    views = [torch.randn(8, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for view in views:
            with hardware.autocast():
                features = encoder(view)
            features.float().mean().backward()
        seconds.append(time.perf_counter() - began)
    return 8 / median(seconds[1:])


if __name__ == "__main__":
    main()
