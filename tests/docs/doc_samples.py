"""The code blocks of the documentation, and a folder in which what they name exists."""

import pickle
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from container_samples import flat, labelled, write_tar
from PIL import Image
from run_samples import write_images

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PROGRAMS = (
    "crosslevel", "make", "pip", "python", "pytest", "pre-commit", "sbatch", "srun", "export", "git", "docker",
    "embedding-atlas",
)  # fmt: skip

TINY = {"epochs": 1, "batch_size": 8, "device": "cpu", "workers": 0, "monitor_every": 0, "report_html": False}
PARTS = {"encoder": {"name": "resnet18", "width": 0.0625}, "cld": {"groups": 4}, "views": {"size": 16}}
"""What makes a training take a second."""


@dataclass(frozen=True)
class Block:
    """A block of code: its page, the number of its first line, its text, and the language that its fence names."""

    page: str
    line: int
    text: str
    language: str

    def __str__(self):
        return f"{self.page}:{self.line}"

    @property
    def kind(self):
        """``shell``, ``python``, or ``text``: output, trees of files, formulas, pictures."""
        first = self.text.strip().split()[0]
        if self.language:
            return {"python": "python", "sh": "shell", "bash": "shell"}.get(self.language, "text")
        if first in PROGRAMS or re.match(r"\w+=[\"']", self.text.strip()):
            return "shell"
        try:
            compile(self.text, str(self), "exec")
        except SyntaxError:
            return "text"
        return "python"

    @property
    def commands(self):
        """Of a shell block: each command's words, without comments; what is assigned is put in its place."""
        assigned, out = {}, []
        for words in map(lambda line: shlex.split(line, comments=True), joined(self.text)):
            if len(words) == 1 and re.match(r"\w+=", words[0]):
                name, _, value = words[0].partition("=")
                assigned[f"${name}"] = value.split()
            elif words:
                out.append([part for word in words for part in assigned.get(word, [word])])
        return out


def joined(text):
    """The lines of a shell program: continued ones, and those of an open quote, are one."""
    line = ""
    for part in text.splitlines():
        line += part
        if line.endswith("\\"):
            line = line[:-1] + " "
        elif line.count('"') % 2 == 0 and line.count("'") % 2 == 0:
            yield line
            line = ""
    assert not line, text


def blocks(page):
    """The blocks of a page: fenced ones, and those that are indented by four spaces."""
    lines, i = page.read_text().splitlines(), 0
    while i < len(lines):
        fence = re.match(r"```(\w*)$", lines[i])
        if fence:
            end = lines.index("```", i + 1)
            yield Block(page.name, i + 2, "\n".join(lines[i + 1 : end]), fence[1] or "text")
            i = end + 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip() or lines[i - 1][:1] == "#"):
            end = i
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(line[4:] for line in lines[i:end]).rstrip()
            yield Block(page.name, i + 1, text, "")
            i = end
        else:
            i += 1


BLOCKS = [block for page in PAGES for block in blocks(page)]
INLINE = [
    (page.name, shlex.split(text))
    for page in PAGES
    for text in re.findall(r"`(crosslevel [a-z]+ [^`]*)`", " ".join(page.read_text().split()))
]
"""The commands within sentences: their page and words."""

METHOD = """from crosslevel.methods import SimCLR


class MyMethod(SimCLR):
    pass
"""
FILM = "videos/a.mp4"
XML = (
    "<annotation><filename>1.png</filename><size><width>40</width><height>40</height></size>"
    + 2 * "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>40</ymax></bndbox></object>"
    + "</annotation>"
)


def furnish(folder):
    """Write what the blocks name: small stand-ins for a user's images."""
    for name in ("photos", "labelled/train", "labelled/test", "imagenet/train", "films"):
        write_images(folder / name, count=8)
    (folder / "fields").mkdir()
    generator = np.random.default_rng(0)
    for i in range(16):
        bands = [Image.fromarray(generator.integers(0, 10_000, (16, 16), np.uint16)) for _ in range(6)]
        bands[0].save(folder / "fields" / f"{i}.tif", save_all=True, append_images=bands[1:])
    scans(folder / "scans", generator)
    (folder / "shards").mkdir()
    for i in range(10):
        write_tar(folder / "shards" / f"train-{i:03}.tar", labelled(range(2 * i, 2 * i + 2)))
    cifar = folder / "data" / "cifar-10-batches-py"
    cifar.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows = {b"data": generator.integers(0, 256, (4, 3072), np.uint8), b"labels": [0, 1, 2, 3]}
        (cifar / name).write_bytes(pickle.dumps(rows, protocol=2))
    (cifar / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"%d" % i for i in range(10)]}, protocol=2))
    pq.write_table(pa.table({"photo": [flat(i) for i in range(16)]}), folder / "data" / "a.parquet")
    voc = folder / "VOC2007"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / part).mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (40, 40), (30 * i, 0, 0)).save(voc / "JPEGImages" / f"{i}.png")
        (voc / "Annotations" / f"{i}.xml").write_text(XML.replace("1.png", f"{i}.png"))
    (voc / "ImageSets" / "Main" / "trainval.txt").write_text("".join(f"{i}\n" for i in range(8)))
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "mymodule.py").write_text(METHOD)
    film(folder / FILM)


def film(file, frames=8):
    """A short film; nothing where PyAV is missing."""
    try:
        import av
    except ImportError:
        return
    file.parent.mkdir()
    with av.open(str(file), "w") as target:
        stream = target.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * i, np.uint8), format="rgb24")
            target.mux(stream.encode(picture))
        target.mux(stream.encode())


def scans(folder, generator, count=16):
    """Slices of a CT; nothing where pydicom is missing."""
    try:
        import pydicom
    except ImportError:
        return
    folder.mkdir()
    for i in range(count):
        slice_ = pydicom.Dataset()
        slice_.file_meta = pydicom.dataset.FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        slice_.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        slice_.file_meta.MediaStorageSOPInstanceUID = f"1.2.{i}"
        slice_.Rows = slice_.Columns = 16
        slice_.BitsAllocated = slice_.BitsStored = 16
        slice_.HighBit, slice_.PixelRepresentation, slice_.SamplesPerPixel = 15, 1, 1
        slice_.PhotometricInterpretation, slice_.RescaleSlope, slice_.RescaleIntercept = "MONOCHROME2", 1, -1024
        slice_.PixelData = generator.integers(0, 2048, (16, 16), np.int16).tobytes()
        slice_["PixelData"].VR = "OW"
        slice_.save_as(folder / f"{i}.dcm", enforce_file_format=True)
