"""The storage of a study: a database, and a folder with locks for workers on one machine.

On one machine locks are filelock's. Retrying (`patiently`) is our own: Optuna raises when its database is unreachable.
Only that error is retried here, and not by a search that must stop.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from filelock import FileLock
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from crosslevel.tuning.plan import FILE, Plan, url
from crosslevel.tuning.sampler import Fresh, distributions, pruner
from crosslevel.utils.errors import MissingExtra, UserError
from crosslevel.utils.files import sync_folder
from crosslevel.utils.locks import hold

PATIENCE = 60.0  # seconds to wait for an unreachable database
# A server that vanishes is noticed in half a minute.
ALIVE = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
Result = TypeVar("Result")
"""The result of a call to the study."""


def patiently(plan: Plan, call: Callable[[], Result], patience: float = PATIENCE) -> Result:
    """The call's result; while the database cannot be reached, the call is repeated for ``patience`` seconds.

    Only for calls that may be made twice: the database may have executed a call before the connection broke.

    Raises:
        ValueError: the database stays unreachable, or the search must stop.

    """
    start_time, pause = None, plan.pause
    while True:
        try:
            return call()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if not _is_away(error):
                raise
            start_time = time.monotonic() if start_time is None else start_time
            if plan.stop.is_set() or time.monotonic() - start_time + pause > patience:
                raise UserError(f"{address(plan)}: the study cannot be reached: {_reason(plan, error)}") from error
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _is_away(error: BaseException | None) -> bool:
    """Whether this error, or its cause, means that the database did not answer."""
    while error is not None:
        if isinstance(error, OperationalError | InterfaceError):
            return True
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__
    return False


def _reason(plan: Plan, error: BaseException) -> str:
    """The error's text without the password, as a library may repeat the address or a part of it."""
    text = " ".join(str(error.__cause__ or error).split())
    secret = plan.storage.partition("://")[2].rpartition("@")[0].partition(":")[2]
    return text.replace(secret, "***") if secret else text


def address(plan: Plan) -> str:
    """The database's address without its password."""
    return plan.storage.rpartition("@")[2]


def opened(plan: Plan, tries: int = 8) -> optuna.Study:
    """Open the study; the first worker creates it.

    Raises:
        ValueError: the study has other settings, or the database cannot be reached.

    """
    (plan.folder / "workers").mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sqlalchemy.make_url(plan.storage).get_dialect()
    except (ArgumentError, ValueError) as error:  # a port that is no number is a ValueError
        raise UserError(f"--storage ***@{address(plan)}: is no address ({_reason(plan, error)})") from None
    for attempt in range(tries):
        try:
            with locked(plan.folder / "study.lock"), locked_everywhere(plan):
                return _create(plan)
        except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            # Workers of other studies that create the same tables at the same time would fail.
            if attempt == tries - 1:
                raise UserError(f"{address(plan)}: the study cannot be opened: {_reason(plan, error)}") from error
            time.sleep(plan.pause * (attempt + 1))
        except ModuleNotFoundError as error:
            raise MissingExtra(f"{error.name} is missing: pip install 'crosslevel[tune]'") from error
    raise AssertionError("unreachable")


def _create(plan: Plan) -> optuna.Study:
    name = plan.folder.name
    if plan.storage == url(None, plan.folder):
        _make_whole(plan.folder / FILE)
    options = _engine() if plan.storage.startswith("sqlite") else {"pool_pre_ping": True}
    study = optuna.create_study(
        storage=optuna.storages.RDBStorage(plan.storage, engine_kwargs=options),
        study_name=name, direction="maximize", load_if_exists=True,
        sampler=Fresh(plan), pruner=pruner(plan.epochs, plan.pruning),
    )  # fmt: skip
    before = study.user_attrs.get("agreed")
    if before is None:
        study.set_user_attr("agreed", plan.agreed)
    elif before != json.loads(json.dumps(plan.agreed)):
        names = [k for k in sorted({*before, *plan.agreed}) if before.get(k) != plan.agreed.get(k)]
        differences = ", ".join(f"{k}={before.get(k)}, not {plan.agreed.get(k)}" for k in names)
        raise UserError(f"{plan.folder}: its study began with other settings: {differences}: give another --output")
    _refuse_foreign(study, plan)
    return study


def _refuse_foreign(study: optuna.Study, plan: Plan) -> None:
    """Refuse a study with trials that this search cannot have made: it may come from anybody.

    Raises:
        UserError: a trial has other parameters or attributes.

    """
    expected = distributions(plan.space)
    for trial in study.get_trials(deepcopy=False):
        for name, searched in trial.distributions.items():
            if searched != expected.get(name):
                raise UserError(
                    f"{plan.folder}: trial {trial.number} of its study has {name!r}, which is not searched, or not in "
                    "this range: it is not this search's: give another --output"
                )


def _make_whole(file: Path) -> None:
    """Create the database with all its tables and indexes under another name, and rename it when it is complete.

    Otherwise a killed process could leave a database without an index, which accepts a study twice. The caller must
    hold the folder's lock.
    """
    for leftover in file.parent.glob(f".{file.name}.*.part*"):
        leftover.unlink()
    if file.exists():
        return
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{part.resolve()}", engine_kwargs=_engine())
        storage.remove_session()
        storage.engine.dispose()  # the last connection to close merges the log
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        if part.with_name(f"{part.name}-wal").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        os.replace(part, file)
    finally:
        for leftover in file.parent.glob(f"{part.name}*"):
            leftover.unlink()
    sync_folder(file.parent)


def _engine() -> dict[str, Any]:
    return {"connect_args": {"timeout": 60, "factory": StudyFile}}


class StudyFile(sqlite3.Connection):
    """An SQLite file that is synced from time to time: a kill loses nothing, a power failure little."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA trusted_schema=OFF")  # triggers and views in a foreign file cannot call functions
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """While the block runs, no other worker or thread of this machine is in one."""
    with FileLock(file):
        yield


@contextlib.contextmanager
def locked_everywhere(plan: Plan) -> Iterator[None]:
    """While the block runs, no other worker of the study is in one, on any machine, if the database is PostgreSQL.

    A machine without a sign of life for ``plan.silent`` seconds loses the lock, and its later calls fail.
    """
    if not plan.storage.startswith("postgresql"):
        yield
        return
    key = int.from_bytes(hashlib.sha256(plan.folder.name.encode()).digest()[:8], "big", signed=True)
    options = ALIVE if plan.storage.startswith("postgresql+psycopg:") else {}
    engine = sqlalchemy.create_engine(plan.storage, poolclass=sqlalchemy.NullPool, connect_args=options)
    with engine.begin() as connection:
        for name, seconds in (("idle_in_transaction_session_timeout", plan.silent), ("lock_timeout", 2 * plan.silent)):
            connection.execute(sqlalchemy.text(f"SET LOCAL {name} = '{seconds}s'"))
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield


def locked_file(file: Path) -> Any:
    """Open the file, locked while this process lives; BlockingIOError if another process has locked it."""
    opened = file.open("a")
    try:
        hold(opened.fileno())
    except OSError:
        opened.close()
        raise
    os.set_inheritable(opened.fileno(), False)
    return opened
