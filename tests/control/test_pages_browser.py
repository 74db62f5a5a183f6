"""The status page in a real browser: keyboard, small screens, both colour schemes, live updates."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from cluster.controller.runner import Report, StageEvent
from cluster.state import Database
from cluster.tenancy.browser_sessions import close_session
from tests.control.page_rows import add_jobs, add_model, add_stages
from tests.control.rows import add_tenant
from tests.control.server import Api, running_api
from tests.control.stages import World

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)
_WAIT_S = 90.0
#: The least contrast of any text with what is behind it, and the text.
_CONTRAST = """
const luminance = (rgb) => {
  const [r, g, b] = rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
let worst = [99, ""];
for (const one of document.querySelectorAll("body *")) {
  const text = [...one.childNodes].filter((n) => n.nodeType === 3 && n.data.trim());
  if (!text.length || !one.getClientRects().length) continue;
  let behind = one;
  while (behind && numbers(getComputedStyle(behind).backgroundColor)[3] === 0)
    behind = behind.parentElement;
  const two = [one, behind || document.body].map((e, i) =>
    luminance(numbers(getComputedStyle(e)[i ? "backgroundColor" : "color"])));
  const ratio = (Math.max(...two) + 0.05) / (Math.min(...two) + 0.05);
  if (ratio < worst[0]) worst = [ratio, text[0].data];
}
return worst;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium here: `apt install chromium chromium-driver` runs these tests")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as found:
        yield found


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    database = Database(sqlite_url)
    yield World(database, tmp_path)
    database.close()


@pytest.fixture
def api(world: World, tmp_path: Path) -> Iterator[Api]:
    with running_api(world.database, tmp_path, settings=world.settings) as found:
        yield found


def look(browser: webdriver.Chrome, width: int, height: int = 800, *, dark: bool = False) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def press(browser: webdriver.Chrome, *keys: str) -> None:
    webdriver.ActionChains(browser).send_keys(*keys).perform()


def focused(browser: webdriver.Chrome) -> str:
    """What has the focus; it must be seen to have it."""
    has = browser.switch_to.active_element
    outline = browser.execute_script(
        "const s = getComputedStyle(arguments[0]); return [s.outlineStyle, s.outlineWidth]", has
    )
    assert outline[0] != "none" and outline[1] != "0px", has.get_attribute("outerHTML")
    return has.text or str(has.get_attribute("id"))


def until(browser: webdriver.Chrome, condition: Callable[[], Any]) -> None:
    WebDriverWait(browser, _WAIT_S, 0.1).until(lambda _: condition())


def log_in(browser: webdriver.Chrome, api: Api, key: str) -> None:
    browser.delete_all_cookies()
    browser.get(f"{api.url}/status/")
    press(browser, key, Keys.ENTER)  # the field has the focus
    until(browser, lambda: browser.title.startswith("Jobs"))


def complaints(browser: webdriver.Chrome) -> list[str]:
    """What the console says; the answer 401 with the form to log in is as it should be."""
    said = [entry["message"] for entry in browser.get_log("browser")]
    return [message for message in said if "401 (Unauthorized)" not in message]


def test_a_job_is_followed_with_the_keyboard_alone(
    browser: webdriver.Chrome, api: Api, world: World
) -> None:
    job_id = world.add_job()
    look(browser, 1100)
    log_in(browser, api, api.key("ten_a"))
    order = []
    while not order or order[-1] != job_id:
        assert len(order) < 20, order
        press(browser, Keys.TAB)
        order.append(focused(browser))
    names = ["Skip to the content", "safeft", "Jobs", "Models", "Log out", "all 1", "submitted 1"]
    assert order == [*names, job_id]

    browser.execute_script("window.loaded = 'once'")
    world.runner.script["training"] = Report("running")
    world.round(times=12)
    assert world.job().phase == "training"
    until(browser, lambda: "training" in browser.find_element(By.ID, "jobs").text)
    assert focused(browser) == job_id  # the place in the page was not lost
    press(browser, Keys.ENTER)
    until(browser, lambda: browser.title.startswith("training"))
    assert browser.execute_script("return window.loaded") is None

    browser.execute_script("window.loaded = 'once'")
    now = browser.find_element(By.CSS_SELECTOR, "[aria-current=step]")
    assert "training" in now.text
    events = [StageEvent(message="step 30 of 80", data={"done": 30, "total": 80})]
    world.runner.script["training"] = Report("running", events=events)
    world.round()
    until(browser, lambda: "step 30 of 80" in browser.find_element(By.ID, "events").text)
    phase = browser.find_element(By.ID, "phase")
    until(browser, lambda: "37" in phase.text)
    world.runner.script.clear()
    world.round(times=12)
    assert world.job().phase == "succeeded"
    until(browser, lambda: "succeeded" in phase.text and browser.title.startswith("succeeded"))
    assert browser.execute_script("return window.loaded") == "once"  # the page was not left
    assert complaints(browser) == []


def test_a_session_that_ends_brings_the_form_by_itself(
    browser: webdriver.Chrome, api: Api, world: World
) -> None:
    log_in(browser, api, api.key("ten_a"))
    cookie = browser.get_cookie("safeft")
    assert cookie is not None and cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    assert browser.execute_script("return document.cookie") == ""
    close_session(world.database, cookie["value"])
    until(browser, lambda: browser.title.startswith("Log in"))
    assert "Your session has ended" in browser.find_element(By.TAG_NAME, "main").text


def test_pages_fit_small_screens_and_are_readable_in_both_schemes(
    browser: webdriver.Chrome, api: Api, world: World
) -> None:
    add_tenant(world.database, "acme")
    add_jobs(api, "acme")
    failed, done = "ftjob-acme-failed", "ftjob-acme-succeeded"
    ends = (("screening", 3.0, 9.0, "done"), ("training", 9.0, 12.0, "refused"))
    add_stages(api, failed, ("validating", 1.0, 3.0, "done"), *ends)
    model = add_model(api, done)
    log_in(browser, api, api.key("acme", role="admin"))
    job = f"jobs/{done}"
    for path in ("", "login", "models", "fleet", job, f"jobs/{failed}", f"{job}/screening",
                 f"models/{model}", "jobs/nothing"):  # fmt: skip
        browser.get(f"{api.url}/status/{path}")
        for width, dark in ((320, False), (1100, True), (320, True), (1100, False)):
            look(browser, width, dark=dark)
            widths = "return [document.documentElement.scrollWidth, innerWidth]"
            scroll, inner = browser.execute_script(widths)
            assert scroll <= inner == width, (path, width)
            contrast, text = browser.execute_script(_CONTRAST)
            assert contrast >= 4.5, (path, dark, text)
            body = "return getComputedStyle(document.body).backgroundColor"
            light = browser.execute_script(body) == "rgb(246, 247, 249)"
            assert light is not dark
    said = [message for message in complaints(browser) if "jobs/nothing" not in message]
    assert said == []
