"""A report in a browser: it draws everything, nothing overflows, hover and dark mode work."""

import json

import pytest
from page_samples import HOSTILE, blocks

from crosslevel import report


def opened(browser, path, width=1200):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())


@pytest.mark.browser
@pytest.mark.parametrize("name", ["name", HOSTILE, "a" * 300])
@pytest.mark.parametrize("width", [390, 1200])
def test_browser_draws_all_and_nothing_overflows(browser, tmp_path, name, width):
    opened(browser, report.page(tmp_path / "r.html", name, blocks(name), subtitle=name, verdict=name), width)
    assert browser.get_log("browser") == []
    script = "return [...document.images].map(i => i.complete ? i.naturalWidth : 0)"
    widths = browser.execute_script(script)
    assert len(widths) == 2 * 5 + 2 + 2
    assert min(widths) > 0
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg')]"
        ".filter(s => s.checkVisibility())"
        ".map(s => [s.clientWidth, s.clientHeight, s.getBBox().width, s.getBBox().height])"
    )
    assert len(boxes) == 4
    assert min(side for box in boxes for side in box) > 50
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    charts = browser.execute_script(
        "const page = document.querySelector('section').clientWidth;"
        "return [...document.querySelectorAll('.chart svg')].filter(s => s.checkVisibility())"
        ".map(s => [s.clientWidth / page, s.querySelector('text').getBoundingClientRect().height])"
    )
    assert all(share > 0.98 and letters >= 10 for share, letters in charts)  # whole width, and to be read
    verdict, nav = (browser.find_element("css selector", f"header > {part}").rect["y"] for part in (".verdict", "nav"))
    assert verdict < nav


@pytest.mark.browser
def test_browser_opens_the_settings_and_hover_shows_the_nearest_picture(browser, tmp_path):
    opened(browser, report.page(tmp_path / "r.html", "T", blocks("name")))
    text = browser.find_element("css selector", "details pre")
    assert not text.is_displayed()
    browser.find_element("css selector", "summary").click()
    assert text.is_displayed()

    tip = browser.find_element("css selector", ".tip")
    hover = json.loads(browser.find_element("css selector", ".map").get_attribute("data-hover"))
    chains = pytest.importorskip("selenium.webdriver.common.action_chains")
    for panel in browser.find_elements("css selector", ".panel"):
        for point in (7, 30):
            x, y = (round((at / 1000 - 0.5) * panel.rect["width"]) for at in hover["points"][point])
            move = chains.ActionChains(browser)
            move.move_to_element_with_offset(panel, x, y)
            move.perform()
            assert tip.is_displayed()
            assert int(tip.get_attribute("data-point")) == point
            assert tip.text == "name\nname"  # its path, and its class
            script = "return [...arguments[0].querySelectorAll('.window, img')].map(e => e.getBoundingClientRect())"
            window, atlas = browser.execute_script(script, tip)
            row, column = divmod(point, hover["columns"])
            assert (window["width"], atlas["width"]) == (96, 96 * hover["columns"])
            assert (window["x"] - atlas["x"], window["y"] - atlas["y"]) == pytest.approx((column * 96, row * 96))
        chains.ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
        assert not tip.is_displayed()


@pytest.mark.browser
def test_browser_follows_dark_mode(browser, tmp_path):
    path = report.page(tmp_path / "r.html", "T", blocks("name"))
    shades = []
    for scheme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        opened(browser, path)
        script = """const shade = (e, p) => getComputedStyle(e)[p].match(/\\d+/g).slice(0, 3).map(Number);
                    return [shade(document.body, 'backgroundColor'),
                            shade(document.querySelector('.chart svg text'), 'fill')]"""
        shades.append([sum(shade) / 3 for shade in browser.execute_script(script)])
    (light, dark_ink), (dark, light_ink) = shades
    assert light - dark_ink > 100
    assert light_ink - dark > 100
