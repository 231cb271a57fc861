"""What all tests share: one hypothesis profile, with the same examples every time and no deadline on a busy
machine, and one thread, also in the processes that tests start, because on tensors this small threads wait for each
other longer than they work.

What tests of several folders import is in `shared`, and for those of faults in `faults`: pyproject.toml puts both on
the path.
"""

import gc

gc.disable()  # while tests are imported: a fifth of the time that it takes

import importlib.metadata
import itertools
import json
import os
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

from forked_workers import fork_workers

# Lightning asks for those of all packages whenever a training begins.
importlib.metadata.entry_points = cache(importlib.metadata.entry_points)

import pytest
import torch
from hypothesis import settings

settings.register_profile("crosslevel", deadline=None, derandomize=True, max_examples=15, print_blob=True)
settings.load_profile("crosslevel")
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


DURATIONS = Path(__file__).with_name("durations.json")
"""Seconds of each test function, over its cases, and of each file's fixtures, where half or more: `make durations`."""
SLOW, SLOW_FIXTURES = 0.5, 2.0  # seconds


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    fork_workers(config, len(specs))


def pytest_collection_modifyitems(items):
    """The longest files first: no process is left with one at the end. What takes long is marked slow."""
    known = json.loads(DURATIONS.read_text())
    spent = Counter()
    for name, seconds in known.items():
        spent[name.partition("::")[0]] += seconds
    for item in items:
        file, name = item.nodeid.partition("::")[0], item.nodeid.partition("[")[0]
        if known.get(name, 0) > SLOW or known.get(file, 0) > SLOW_FIXTURES:
            item.add_marker("slow")
    items.sort(key=lambda item: -spent[item.nodeid.partition("::")[0]])


def pytest_collection_finish():
    """The garbage collector works from here on, and need not look at what was imported."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # or triton's bindings report leaks at the process's end


def pytest_terminal_summary(terminalreporter):
    """With CROSSLEVEL_DURATIONS=FILE, leave there what took how long."""
    if "CROSSLEVEL_DURATIONS" not in os.environ:
        return
    spent = Counter()
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            whose = report.nodeid.partition("[")[0]
            spent[whose if report.when == "call" else whose.partition("::")[0]] += report.duration
    found = {name: round(seconds, 1) for name, seconds in sorted(spent.items()) if seconds >= SLOW}
    Path(os.environ["CROSSLEVEL_DURATIONS"]).write_text(json.dumps(found, indent=0) + "\n")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Indexes of sources are kept in a folder of this run, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSLEVEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, driven by selenium; skips where either is absent."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()
