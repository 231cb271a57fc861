"""A page in headless Chromium, used as a reader uses it: the pointer, choices, what is shown."""

import time

import pytest


def opened(browser, address, width=1300, height=900):
    """Open a page in a window of this size, with nothing in the console."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")
    browser.get(address)


def until(condition, what="it"):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come")


def element(browser, selector):
    return browser.find_element("css selector", selector)


def elements(browser, selector):
    return browser.find_elements("css selector", selector)


def move(browser, places, press=False):
    actions = pytest.importorskip("selenium.webdriver.common.actions.action_builder")
    builder = actions.ActionBuilder(browser, duration=20)
    for i, (x, y) in enumerate(places):
        builder.pointer_action.move_to_location(round(x), round(y))
        if press and i == 0:
            builder.pointer_action.pointer_down()
    if press:
        builder.pointer_action.pointer_up()
    builder.perform()


def where(browser, point):
    """Where a point of explore's map is on the screen."""
    return browser.execute_script("return whereIs(arguments[0])", point)


def colour_by(browser, column):
    """Choose a column in explore's page, as with the mouse."""
    select = pytest.importorskip("selenium.webdriver.support.select")
    select.Select(element(browser, "#colour")).select_by_visible_text(column)


def count(browser):
    """How many images explore's page says it shows."""
    return int(element(browser, "#count").get_attribute("data-shown"))


def loaded(browser, selector="img"):
    """Wait until every picture that is shown there has loaded, and return their titles."""
    script = """return [...document.querySelectorAll(arguments[0])].filter(i => i.checkVisibility())
                       .map(i => [i.complete && i.naturalWidth > 0, i.title])"""
    until(lambda: all(done for done, _ in browser.execute_script(script, selector) or [(False, "")]), selector)
    return [title for _, title in browser.execute_script(script, selector)]


def in_view(browser, selector):
    """Whether the middle of an element is on the screen, and nothing lies over it."""
    script = """const e = document.querySelector(arguments[0]), box = e.getBoundingClientRect();
                return e.contains(document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2))"""
    return browser.execute_script(script, selector)


def downloads(browser, folder):
    """From here on, what a page has to download goes into this folder."""
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
