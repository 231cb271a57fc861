"""Folders of object stores (runs and packs), mirrored on this machine while a command works with them.

The store is authoritative: `fetch` copies its files here, `send` copies the local files there. An object appears when
it is complete, and objects that refer to others are sent after those, so that a command can continue after a kill. Two
machines are not prevented from writing to one folder of a store.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from crosslevel.data.index_cache import cache_folder
from crosslevel.data.sources.containers.copies import check_room, download
from crosslevel.data.sources.containers.patience import patiently
from crosslevel.data.sources.containers.remote import reason, state_of, system_of
from crosslevel.utils.errors import MachineError, SourceError
from crosslevel.utils.files import BEST, LAST, PREVIOUS, is_unfinished, write
from crosslevel.utils.locks import LOCK

_LATE = (PREVIOUS, LAST, BEST, "pack.json")  # in this order, after all others
FileStat = tuple[int, int]  # when a file was changed, and its bytes


class StoredFolder:
    """The folder at an address.

    Args:
        address: such as ``s3://bucket/runs/photos``.
        part: distinguishes several commands on one machine, each with its own files in the cache.

    Attributes:
        folder: the local folder with its files.

    """

    def __init__(self, address: str, part: str = "") -> None:
        self.address = address.rstrip("/")
        name = hashlib.sha256(f"{self.address}\n{part}".encode(errors="surrogateescape")).hexdigest()[:24]
        self.folder = cache_folder() / "folders" / name / (PurePosixPath(self.address).name or "folder")
        self._notes = self.folder.parent / "known.json"
        self.system, self.path = system_of(self.address)
        # By name: the object's state in the store, and the local file's state when both were the same.
        self.synced: dict[str, tuple[str, FileStat]] = {}
        with suppress(OSError, ValueError, TypeError):
            notes = json.loads(self._notes.read_text(encoding="utf-8"))
            self.synced = {name: (state, (status[0], status[1])) for name, (state, status) in notes.items()}

    def listed(self) -> dict[str, dict[str, Any]]:
        """The store's objects and their metadata, by their names within the folder.

        Raises:
            SourceError: the store does not answer.

        """
        try:
            self.system.invalidate_cache()
            objects = patiently(lambda: self.system.find(self.path, detail=True))
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise SourceError(f"{self.address}: cannot be listed: {reason(error)}") from error
        names = {file[len(self.path) :].strip("/"): info for file, info in objects.items()}
        return {name: info for name, info in names.items() if name and ".." not in PurePosixPath(name).parts}

    def fetch(self, selected: Callable[[str], bool] = lambda name: True) -> None:
        """Copy the store's files whose names are ``selected`` here; others are left out.

        Raises:
            SourceError: something cannot be read, or there is no room for it.

        """
        stored = {name: info for name, info in self.listed().items() if selected(name)}
        for name in self._files().keys() - stored.keys():
            (self.folder / name).unlink(missing_ok=True)
        changed = {name: info for name, info in stored.items() if not self._is_same(name, state_of(info))}
        check_room(sum(int(info["size"]) for info in changed.values()), self.address)
        closing = threading.Event()
        for name, info in changed.items():
            file = self.folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            download(f"{self.address}/{name}", file, int(info["size"]), closing)
            self.synced[name] = (state_of(info), _stat_of(file))
        self._note()

    def send(self) -> None:
        """Copy the local files to the store, and delete there the objects whose local files were removed.

        Raises:
            MachineError: the store refuses them; the local files stay.

        """
        files = self._files()
        stored_as = {status: name for name, (_, status) in self.synced.items()}
        try:
            for name in sorted(files, key=_turn):
                status = files[name]
                if name in self.synced and self.synced[name][1] == status:
                    continue
                self._put(name, status, stored_as.get(status))
                stored_as = {stored_status: holder for stored_status, holder in stored_as.items() if holder != name} | {
                    status: name
                }
            for name in self.synced.keys() - files.keys():
                with suppress(FileNotFoundError):
                    patiently(partial(self.system.rm_file, f"{self.path}/{name}"))
                del self.synced[name]
        except Exception as error:
            raise MachineError(
                f"{self.address} cannot be written: {reason(error)}; its files are in {self.folder}"
            ) from error
        finally:
            self._note()

    def remove(self, name: str) -> None:
        """Delete one object of the store, if it is there."""
        self.synced.pop(name, None)
        try:
            if patiently(lambda: self.system.exists(f"{self.path}/{name}")):
                patiently(lambda: self.system.rm_file(f"{self.path}/{name}"))
        except Exception as error:
            raise MachineError(f"{self.address} cannot be written: {reason(error)}") from error

    def clear(self) -> None:
        """Remove the files here; the store keeps its own."""
        for name in self._files():
            (self.folder / name).unlink(missing_ok=True)
        self.synced = {}
        self._note()

    def _put(self, name: str, status: FileStat, copied_from: str | None) -> None:
        """Send one object; if the store has the same content under another name, it is copied within the store."""
        file, target = self.folder / name, f"{self.path}/{name}"
        if copied_from is not None:
            try:
                patiently(lambda: self.system.cp_file(f"{self.path}/{copied_from}", target))
            except Exception:  # not every store can
                copied_from = None
        if copied_from is None:
            patiently(lambda: self.system.put_file(str(file), target))
        self.system.invalidate_cache()
        info = patiently(lambda: self.system.info(target))
        if int(info["size"]) != status[1]:
            raise OSError(f"{name} has {info['size']} bytes there instead of {status[1]}")
        self.synced[name] = (state_of(info), status)

    def _is_same(self, name: str, state: str) -> bool:
        if name not in self.synced or self.synced[name][0] != state:
            return False
        with suppress(OSError):
            return _stat_of(self.folder / name) == self.synced[name][1]
        return False

    def _files(self) -> dict[str, FileStat]:
        """The local files, without locks and unfinished files."""
        files = {}
        for directory, _, names in os.walk(self.folder):
            for name in names:
                file = Path(directory, name)
                if name != LOCK and not is_unfinished(name) and not file.is_symlink():
                    files[file.relative_to(self.folder).as_posix()] = _stat_of(file)
        return files

    def _note(self) -> None:
        self._notes.parent.mkdir(parents=True, exist_ok=True)
        write(self._notes, json.dumps(self.synced))


def _turn(name: str) -> tuple[int, str]:
    """The position of a file in the order of sending."""
    last = PurePosixPath(name).name
    return (_LATE.index(last) + 1 if last in _LATE else 0), name


def _stat_of(file: Path) -> FileStat:
    status = file.stat()
    return status.st_mtime_ns, status.st_size
