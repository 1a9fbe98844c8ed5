"""The page at /, in headless Chromium against the server with the bundled model."""

import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from live_server import LiveServer
from tiny_model import tiny_gguf

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

webdriver = pytest.importorskip("selenium.webdriver")
wait = pytest.importorskip("selenium.webdriver.support.wait")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")

KEY = "secret-key"
FLAGS = ("--ctx", "4096", "--batch", "64", "--threads", "1", "--name", "tiny")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(tiny_gguf(), *FLAGS, "--api-key", KEY) as live:
        yield live.ready()


@pytest.fixture(scope="module")
def browser() -> Iterator["Chrome"]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1400,1000",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(server: LiveServer, browser: "Chrome") -> "Page":
    page = Page(browser)
    browser.get(server.url)
    page.wait(lambda: page.is_shown("locked"))
    page.find("key").send_keys(KEY)
    page.find("key").submit()
    page.wait(lambda: page.text("state") == "ready")
    return page


class Page:
    """The page as someone sees it, by the ids of its elements."""

    def __init__(self, browser: "Chrome") -> None:
        self.browser = browser

    def find(self, name: str):
        return self.browser.find_element("id", name)

    def text(self, name: str) -> str:
        return self.find(name).text

    def is_shown(self, name: str) -> bool:
        return self.find(name).is_displayed()

    def wait(self, found: Callable[[], object]) -> None:
        wait.WebDriverWait(self.browser, 90).until(lambda _: found())

    def ask(self, text: str, effort: str = "") -> None:
        for name, value in (("effort", effort), ("text", text)):
            self.browser.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)
        self.find("send").click()

    def is_idle(self) -> bool:
        return self.find("send").is_enabled()


def test_it_shows_the_model_the_memory_and_the_context(page: Page) -> None:
    assert page.text("model") == "tiny" and "drafting auto" in page.text("options")
    assert not page.is_shown("locked")
    assert "of 4,096" in page.text("context")
    memory = page.text("memory")
    assert "weights, routed experts" in memory and "KV cache, full attention" in memory and "The process" in memory


def test_a_chat_streams_can_be_stopped_and_goes_on(page: Page) -> None:
    page.ask("Tell me everything.", effort="none")
    page.wait(lambda: page.find("stop").is_enabled() or page.is_idle())
    page.wait(lambda: len(page.text("talk")) > 30 or page.is_idle())
    if page.find("stop").is_enabled():
        page.find("stop").click()
    page.wait(page.is_idle)
    page.ask("And?", effort="none")
    page.wait(page.is_idle)
    assert page.text("talk").index("Tell me everything.") < page.text("talk").index("And?")
    page.wait(lambda: "checkpoints" in page.text("sessions"))
    page.find("again").click()
    assert page.text("talk") == ""


def test_reasoning_is_folded(page: Page) -> None:
    page.ask("Hello", effort="low")
    page.wait(lambda: page.browser.find_elements("css selector", "#talk details") or page.is_idle())
    page.find("stop").click() if page.find("stop").is_enabled() else None
    page.wait(page.is_idle)
    [folded] = page.browser.find_elements("css selector", "#talk details")
    assert folded.get_attribute("open") is None
    thought = page.browser.execute_script("return document.querySelector('.thought').textContent")
    assert folded.is_displayed() == bool(thought)
    page.find("again").click()


def test_an_answers_text_never_becomes_markup(page: Page) -> None:
    script = "const view = answerView(), m = {content: ''}; showDelta(view, m, {choices: [{delta: {content: arguments[0]}}]}); return [m.content, view.text.children.length]"
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    assert page.browser.execute_script(script, markup) == [markup, 0]
    page.find("again").click()


def test_an_error_is_shown_in_the_talk(page: Page) -> None:
    page.ask("x" * 20000, effort="none")
    page.wait(lambda: "prompt is too long" in page.text("talk"))
    page.wait(page.is_idle)
    page.find("again").click()


def test_it_asks_nobody_but_its_server_and_logs_no_error(page: Page, server: LiveServer) -> None:
    asked = page.browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked and all(url.startswith(server.url) for url in asked)
    expected = ("401", "400")  # before the key was given, and the prompt that was too long
    errors = [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in errors if not any(code in message for code in expected)] == []


def test_nothing_can_be_sent_to_a_server_that_is_loading_or_gone(page: Page) -> None:
    page.wait(page.is_idle)
    script = "showHead({state: arguments[0], model: 'tiny'}); return [$('send').disabled, $('state-of-all').className]"
    assert page.browser.execute_script(script, "loading") == [True, "column"]
    assert page.browser.execute_script(script, "no answer") == [True, "column away"]
    page.wait(page.is_idle)


def test_a_prompt_that_was_refused_is_back_in_the_box(page: Page) -> None:
    page.ask("y" * 20000, effort="none")
    page.wait(lambda: "prompt is too long" in page.text("talk"))
    page.wait(page.is_idle)
    assert page.find("text").get_attribute("value") == "y" * 20000
    page.browser.execute_script("$('text').value = ''")
    page.find("again").click()


def test_it_fits_a_phone_with_the_chat_first(page: Page) -> None:
    page.browser.set_window_size(420, 900)
    widths = page.browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert widths[0] <= widths[1]
    tops = [page.find(name).location["y"] for name in ("talk", "send", "stop", "requests")]
    assert tops[0] < tops[1] == tops[2] < tops[3], "the buttons on one line, what the server does below"
    page.browser.set_window_size(1400, 1000)
