"""What all tests share: one hypothesis profile, with the same examples every time and no deadline on a busy
machine, and one thread, also in the processes that tests start, because on tensors this small threads wait for each
other longer than they work.

This file's place also makes `reference` importable from every test folder.
"""

import os
import shutil

import pytest
import torch
from hypothesis import settings

settings.register_profile("crosslevel", deadline=None, derandomize=True, max_examples=15, print_blob=True)
settings.load_profile("crosslevel")
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """The longest first: of several processes none is left with them at the end. A file's size stands for its time."""
    size = {path: path.stat().st_size for path in {item.path for item in items}}
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, -size[item.path]))


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
