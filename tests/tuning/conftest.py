"""A real PostgreSQL server of the tests' own to share a study in, and labels that may not be read."""

import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from crosslevel.data.images import Images
from crosslevel.data.open import open_by_name

USER = "postgres"


@pytest.fixture(scope="session")
def postgresql():
    """The address of an empty database on a server that lives as long as the tests; skips without the programs."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin")) or [os.path.dirname(shutil.which("initdb") or "")]
    binaries = Path(found[-1])
    if not (binaries / "initdb").is_file():
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    root = os.geteuid() == 0
    if root and USER not in {entry.pw_name for entry in pwd.getpwall()}:
        pytest.skip(f"needs the user {USER}: PostgreSQL does not run as root")
    # Not below pytest's folder, which other users may not enter.
    home = Path(tempfile.mkdtemp(prefix="crosslevel-postgresql-"))
    who = ["runuser", "-u", USER, "--"] if root else []
    if root:
        shutil.chown(home, USER)

    def call(program, *options):
        line = [*who, str(binaries / program), *options]
        subprocess.run(line, check=True, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = str(home / "data")
    try:
        call("initdb", "-D", data, "-U", USER, "-A", "trust", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        call("pg_ctl", "-D", data, "-o", options, "-l", str(home / "log"), "-w", "start")
        yield f"postgresql://{USER}@127.0.0.1:{port}/postgres"
    finally:
        if (home / "data" / "postmaster.pid").exists():
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(home, ignore_errors=True)


class Guarded:
    """Labels that may be had, but not read."""

    def __set__(self, thing, value):
        vars(thing)["hidden labels"] = value

    def __get__(self, thing, owner=None):
        if thing is not None and vars(thing).get("hidden labels") is not None:
            raise AssertionError("labels were read")


@pytest.fixture
def guarded(monkeypatch):
    monkeypatch.setattr(Images, "labels", Guarded(), raising=False)
    open_by_name.cache_clear()
    yield
    open_by_name.cache_clear()
