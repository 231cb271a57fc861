"""No text steers the terminal, and no password is told."""

import io
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text
from torchvision.io import write_png

from crosslevel import report
from crosslevel.cli import main
from crosslevel.data.pack import origin_metadata
from crosslevel.data.uri import parse
from crosslevel.evaluation.push import card
from crosslevel.models.encoder import Encoder
from crosslevel.runs import Run
from crosslevel.settings import describe
from crosslevel.training.loop.loggers import Boards
from crosslevel.utils.console import Terminal, say
from crosslevel.utils.errors import hidden
from crosslevel.utils.processes import CommandLine, StopRequest

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202eb[/red]:smile:"


def screen(**options):
    return Terminal(file=io.StringIO(), width=200, **options)


def table(text):
    made = Table(title=text)
    made.add_column(text)
    made.add_row(text)
    return made


@pytest.mark.parametrize("form", [str, Text, table], ids=["line", "text", "table"])
def test_no_form_of_text_steers_the_terminal(form):
    console = screen(force_terminal=False)
    console.print(form(HOSTILE), "second\tline\nthird")
    printed = console.file.getvalue()
    assert all(c.isprintable() or c in "\n\t" for c in printed)
    assert r"\x1b]0;owned" in printed
    assert r"\u202eb[/red]:smile:" in printed
    assert "third" in printed.splitlines()[-1]


def test_a_bar_and_colours_keep_the_consoles_own_codes_alone():
    console = screen(force_terminal=True)
    with Progress(TextColumn("{task.fields[name]}", markup=False), console=console) as bar:
        bar.add_task("", name=HOSTILE)
    console.print(HOSTILE, style="red")
    printed = console.file.getvalue()
    assert "\x1b[31m" in printed
    assert not any(code in printed for code in ("\x1b]0;", "\x1b[2J", "\x9b", "\u202e", "\x07"))


def test_a_file_name_that_is_no_unicode_can_be_printed():
    console = screen()
    say(console, "photos/\udcff.png")
    console.print("photos/\udcff.png")
    assert console.file.getvalue() == "photos/\\udcff.png\n" * 2


SCRIPT = """
import sys, crosslevel
listed = crosslevel.subset("photos")
crosslevel.inspect("photos", workers=0)
print("went on", listed, file=sys.stderr)
"""


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        write_png(torch.randint(256, (3, 8, 8), dtype=torch.uint8), f"photos/{i}.png")


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_a_closed_output_does_not_end_the_program_that_calls(photos, environment):
    """As ``python script.py | true`` closes it; the lines are dropped, and the script's own status stays."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
        env=os.environ | environment,
    )  # fmt: skip
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "went on subset.txt\n"), ended.stderr


@pytest.mark.parametrize("line", ["subset photos", "inspect photos --workers 0"])
def test_a_closed_output_ends_a_command_quietly(photos, line, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, os.fdopen(writing, "w") as out:
        patch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as end:
            main(line.split())
    assert (end.value.code, capfd.readouterr().err) == (141, "")
    assert not CommandLine.runs


def test_a_second_interruption_is_an_exception():
    """Of a function that a program calls; a command makes an exit of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt, match="stopped"):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://bob:PW@h/d", "postgresql://bob:***@h/d"),
        ("--storage postgres//bob:PW@h: give", "--storage postgres//bob:***@h: give"),
        ("postgres:bob:PW@h", "postgres:bob:***@h"),
        ("mysql+pymysql://a:P@W@c/d", "mysql+pymysql://a:***@c/d"),
        ("s3://key:P/W+@bucket/x.tar@list=f", "s3://key:***@bucket/x.tar@list=f"),
        ("https://h/x.tar?X-Amz-Date=1&X-Amz-Signature=PW%2F", "https://h/x.tar?X-Amz-Date=***&X-Amz-Signature=***"),
        ("https://h/a.parquet?sig=PW+/=,column=image@list=f", "https://h/a.parquet?sig=***,column=image@list=f"),
        ("https://h/x.tar?v=2&access_token=PW: no such file", "https://h/x.tar?v=2&access_token=***: no such file"),
        ("'https://h/x.tar?Key-Pair-Id=a&Signature=PW~PW_'", "'https://h/x.tar?Key-Pair-Id=a&Signature=***'"),
        ("https://bob:PW@h/x.tar?token=PW.", "https://bob:***@h/x.tar?token=***."),
        ("https://h/x.tar?monkey=1&design=2", None),
        ("https://h:8080/x.tar@list=f", None),
        ("s3://bucket/x.tar@repeat=2", None),
        ("VOC2007:trainval@unique", None),
        ("turntable:train,classes=2@imbalance=9", None),
    ],
)
def test_passwords_of_addresses_are_hidden(text, shown):
    assert hidden(text) == (text if shown is None else shown)
    console = screen()
    console.print(table(text))
    assert "PW" not in console.file.getvalue()


SIGNED = "https://bob:PW@host/shards/x-{0..9}.tar?X-Amz-Signature=PW/PW@repeat=2"


def test_nothing_that_is_published_has_a_secret(tmp_path):
    """A page, a logger's settings, a model card, a pack's own description."""
    blocks = [
        report.settings("Settings", f"images: {SIGNED}\nseed: 0\n"), report.commands("Next", [f"crosslevel {SIGNED}"]),
        report.text("Warnings", f"{SIGNED}: changed"), report.table("Runs", ["a", "b"], [[SIGNED, 1.0]]),
    ]  # fmt: skip
    page = report.page(tmp_path / "p.html", SIGNED, blocks, f"of {SIGNED}", SIGNED).read_text()
    assert page.count("X-Amz-Signature=***@repeat=2") == 8  # the title twice
    encoder = {"name": SIGNED, "pretrained": True, "weights": SIGNED}
    settings = {"images": SIGNED, "data_root": SIGNED, "encoder": encoder, "views": {"scale": [SIGNED]}}
    run, board = Run(tmp_path), Board()
    run.config.write_text(yaml.safe_dump(settings))
    Boards(run, [], [board], settings)
    assert board.settings.keys() == {"images", "data_root", *(f"encoder.{name}" for name in encoder), "views.scale"}
    page_of_hub = card(run, Encoder("resnet18", width=0.0625), "owner/name", "mit")
    assert page_of_hub.count("x-{0..9}.tar?X-Amz-Signature=***") == 7  # data, five settings, weights
    assert "PW" not in f"{page} {board.settings} {page_of_hub} {origin_metadata(parse(SIGNED), None, Unwatched)}"


class Board:
    """A logger of Lightning's interface that keeps the settings it is given."""

    def log_hyperparams(self, settings):
        self.settings = settings


class Unwatched:
    """Of a source, what a pack's description asks for."""

    watch = None


@pytest.mark.parametrize(("images", "mode"), [(SIGNED, 0o600), ("photos", 0o644)])
def test_settings_with_a_secret_are_kept_whole_for_their_owner_alone(tmp_path, images, mode):
    before = os.umask(0o022)
    try:
        describe.write({"images": images}, tmp_path / "config.yaml")
    finally:
        os.umask(before)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"images": images}
    assert (tmp_path / "config.yaml").stat().st_mode & 0o777 == mode
