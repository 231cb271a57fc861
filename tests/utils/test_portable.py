"""What Linux and macOS have and Windows lacks is used where it is there, and needed nowhere but in a search."""

import os
import sys

from forks import ended
from run_samples import write_images

MODULES = ["fcntl", "resource"]
NAMES = {
    "os": ["register_at_fork", "preadv", "pread", "memfd_create", "sched_getaffinity"],
    "signal": ["SIGBUS", "SIGCHLD", "SIGSYS", "SIGHUP", "sigwaitinfo", "pthread_sigmask"],
}
CODE = f"""
import importlib, os, pkgutil, signal, sys
import filelock, lightning_fabric, matplotlib.figure, optuna, pyarrow.parquet, sqlalchemy, timm, torch, torchvision
kept = {{name: importlib.import_module(name) for name in {MODULES}}}
for name in kept:
    sys.modules[name] = None
for module, names in {NAMES}.items():
    for name in names:
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
import crosslevel
for module in pkgutil.walk_packages(crosslevel.__path__, "crosslevel."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
sys.modules.update(kept)  # for other libraries, which have their own ways elsewhere
crosslevel.pack("photos", output="packed", size=16, quiet=True)
encoder = crosslevel.Encoder("resnet18", width=0.0625)
encoder.adapt(32)
encoder.save("encoder.safetensors")
print(crosslevel.embed("encoder.safetensors", "packed", device="cpu", workers=0, quiet=True).features.shape)
from crosslevel.data.decoding.memory import limit_process, room
limit_process()
with room(10**9):
    crosslevel.tune("photos")
"""


def test_nothing_else_needs_locks_and_signals_of_posix(tmp_path):
    """Every file is imported, images are packed and read again, features are written; a search says what it needs.

    In a fork that forgets the package, and has all others.
    """
    write_images(tmp_path / "photos")

    def call():
        os.chdir(tmp_path)
        for name in [name for name in sys.modules if name.partition(".")[0] == "crosslevel"]:
            del sys.modules[name]
        exec(CODE, {"__name__": "__main__"})

    error = ended(tmp_path, call)[1]
    assert (tmp_path / "out").read_text() == "(24, 32)\n", error
    assert "UserError: crosslevel tune tells living workers by the locks of Linux and macOS" in error
