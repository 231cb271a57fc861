"""The pages that the verbs write, in a browser: on a telephone, a small and a large screen, light and dark."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from optuna_samples import searched_page
from run_samples import write_images
from table_samples import crowds, noise_pictures, write_table

import crosslevel
from crosslevel.models.encoder import Encoder
from crosslevel.transforms.views import Views

WIDTHS = (390, 820, 1440)
OVERFLOW = """
const width = document.documentElement.clientWidth;
return [document.documentElement.scrollWidth - width, ...[...document.querySelectorAll('body *')]
    .filter(e => e.checkVisibility() && ['hidden', 'clip'].includes(getComputedStyle(e).overflowX)
                 && e.scrollWidth > e.clientWidth + 1 && !e.closest('svg, .unseen'))  // which only a reader's voice has
    .map(e => e.outerHTML.slice(0, 120))];
"""
PICTURES = """
const done = arguments[0], shown = [...document.images].filter(i => i.checkVisibility());
const lost = i => i.decode().then(() => [], () => [i.outerHTML.slice(0, 120)]);
Promise.all(shown.map(lost)).then(all => done(all.flat()));
"""
CHARTS = """
const page = document.querySelector('section').clientWidth;
return [...document.querySelectorAll('.chart svg')].filter(s => s.checkVisibility()).map(s => s.clientWidth / page);
"""
OVERLAPPING = """
const found = [];
for (const chart of [...document.querySelectorAll('svg')].filter(s => s.checkVisibility())) {
    const labels = [...chart.querySelectorAll('text')].filter(t => t.textContent.trim() && t.checkVisibility());
    const boxes = labels.map(t => t.getBoundingClientRect());
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
        const a = boxes[i], b = boxes[j];
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && high > 0.3 * Math.min(a.height, b.height))
            found.push(labels[j].textContent + ' | ' + labels[i].textContent);
    }
}
return found;
"""
CONTRAST = """
const shade = colour => { const c = colour.match(/[\\d.]+/g).map(Number);
                          return c.length > 3 && c[3] == 0 ? null : (c[0] + c[1] + c[2]) / 3; };
const behind = e => { for (; e; e = e.parentElement) { const s = shade(getComputedStyle(e).backgroundColor);
                                                       if (s !== null) return s; } return 255; };
return [...document.querySelectorAll('h1, h2, p, td, th, a, pre, .chart svg text')]
    .filter(e => e.checkVisibility() && e.textContent.trim())
    .map(e => [e.textContent.trim().slice(0, 40), Math.abs(behind(e)
               - shade(getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color']))])
    .filter(([text, apart]) => apart < 60);
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """What train, compare, inspect and tune write about forty small pictures."""
    folder = tmp_path_factory.mktemp("pages")
    photos, run = str(write_images(folder / "photos", 20)), folder / "run"
    crosslevel.train(
        photos, run=str(run), encoder=partial(Encoder, "resnet18", width=0.0625), views=partial(Views, "cifar", 16),
        epochs=3, batch_size=8, device="cpu", workers=0, log_every=1, monitor="both", monitor_every=1, quiet=True,
    )  # fmt: skip
    crosslevel.evaluate(str(run), photos, photos, protocol="knn,clustering", device="cpu", workers=0, quiet=True)
    shutil.copytree(run, folder / "a-run-with-a-rather-long-name-such-as-people-give-to-their-own")
    both = [str(run), str(folder / "a-run-with-a-rather-long-name-such-as-people-give-to-their-own")]
    crosslevel.compare(both, output=str(folder / "both"), quiet=True)
    crosslevel.inspect(photos, output=str(folder / "inspected.json"), run=str(run), device="cpu", quiet=True)
    return {
        "train": run / "report.html",
        "compare": folder / "both.html",
        "inspect": folder / "inspected.html",
        "tune": searched_page(folder / "search", photos),
    }


@pytest.fixture(scope="module")
def pages_of_a_table(tmp_path_factory):
    """What search, explore and curate write about 48 pictures: also a copy, a black one, and one that lies alone."""
    folder = tmp_path_factory.mktemp("table")
    features, owner = crowds([16, 16, 16])
    classes = ["ant", "a-kind-of-bee-with-a-rather-long-name-such-as-zoologists-give-to-theirs", "cat"]
    paths = [
        f"a folder that somebody has named after what is in it/{classes[c]}/{i:03}.png" for i, c in enumerate(owner)
    ]
    pictures = noise_pictures(48)
    features[1], pictures[1], pictures[2] = features[0], pictures[0], torch.zeros(3, 32, 32, dtype=torch.uint8)
    features[3] = torch.eye(16)[9]
    columns = {"class": [classes[c] for c in owner], "loss": torch.linspace(0, 1, 48).numpy()}
    table = str(write_table(folder / "f.parquet", features, paths, pictures, **columns))
    crosslevel.search(table, paths[20], k=12, output=str(folder / "found"), device="cpu", quiet=True)
    crosslevel.curate(table, n=8, output=str(folder / "few.txt"), device="cpu", quiet=True)
    page = crosslevel.explore(table, export=str(folder / "page"), device="cpu", quiet=True)
    return {"search": folder / "found" / "search.html", "curate": folder / "few.html", "explore": Path(page)}


@pytest.mark.browser
@pytest.mark.parametrize("name", ["search", "curate", "explore"])
def test_a_page_of_a_table_fits_every_screen_and_can_be_read(browser, pages_of_a_table, name):
    fits_every_screen_and_can_be_read(browser, pages_of_a_table[name], "choose(20)" if name == "explore" else "")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("name", ["train", "compare", "inspect", "tune"])
def test_a_page_fits_every_screen_and_can_be_read(browser, pages, name):
    fits_every_screen_and_can_be_read(browser, pages[name])


def fits_every_screen_and_can_be_read(browser, page, opens=""):
    """``opens`` is a script that shows what else the page has."""
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        for width in WIDTHS:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(page.as_uri())
            browser.execute_script(opens)
            told = (scheme, width)
            assert browser.execute_async_script(PICTURES) == [], told
            assert browser.get_log("browser") == [], told
            assert browser.execute_script(OVERFLOW) == [0], told
            assert all(share > 0.98 for share in browser.execute_script(CHARTS)), told
            assert browser.execute_script(OVERLAPPING) == [], told
            assert browser.execute_script(CONTRAST) == [], told
