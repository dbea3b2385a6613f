"""The page at /, in headless Chromium."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_served import Running, byte_tokenizer, running_server, served_model

selenium = pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=str(DRIVER))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def server() -> Iterator[Running]:
    with running_server(served_model(), byte_tokenizer()) as running:
        yield running


def text(browser: webdriver.Chrome, name: str) -> str:
    return str(browser.find_element(By.ID, name).text)


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def fill(browser: webdriver.Chrome, name: str, value: str) -> None:
    field = browser.find_element(By.ID, name)
    field.clear()
    field.send_keys(value)


def test_a_prompt_streams_and_the_cache_is_seen(
    browser: webdriver.Chrome, server: Running, tmp_path: Path
) -> None:
    browser.get(server.url)
    wait_until(lambda: "k3v3-oblivious" in text(browser, "what"))
    assert text(browser, "bits") == "6.500"
    fill(browser, "prompt", "Hello there")
    fill(browser, "max", "500")
    fill(browser, "seed", "3")
    browser.find_element(By.ID, "send").click()
    lengths: set[int] = set()
    held: set[str] = set()

    def over() -> bool:
        lengths.add(len(text(browser, "answer")))
        held.add(text(browser, "tokens"))
        return "tokens in" in text(browser, "status")

    wait_until(over, 60)
    # it grew, and so did the cache
    assert len(lengths) > 3
    assert len(held - {"0"}) > 1
    assert "11 in the prompt" in text(browser, "status")
    assert browser.find_element(By.ID, "send").is_enabled()
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []


def test_stop_and_errors(browser: webdriver.Chrome, server: Running) -> None:
    browser.get(server.url)
    wait_until(lambda: "tiny" in text(browser, "what"))
    fill(browser, "max", "600")
    browser.find_element(By.ID, "send").click()
    wait_until(lambda: text(browser, "status") == "Generating …")
    browser.find_element(By.ID, "stop").click()
    wait_until(lambda: text(browser, "status") == "Stopped.")
    wait_until(server.served.engine.idle)
    fill(browser, "max", "5000")
    browser.find_element(By.ID, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    wait_until(lambda: "maximum context length is 640 tokens" in text(browser, "status"))


def test_chat_with_a_key(browser: webdriver.Chrome) -> None:
    with running_server(served_model(), byte_tokenizer(), api_key="secret") as server:
        browser.get(server.url)
        wait_until(lambda: browser.find_element(By.ID, "key").is_displayed())
        fill(browser, "key", "secret")
        wait_until(lambda: "tiny" in text(browser, "what"))
        browser.find_element(By.CSS_SELECTOR, "#mode option[value=chat]").click()
        fill(browser, "max", "5")
        browser.find_element(By.ID, "send").click()
        wait_until(lambda: "tokens in" in text(browser, "status"))


def test_every_field_has_a_label(browser: webdriver.Chrome, server: Running) -> None:
    browser.get(server.url)
    for field in browser.find_elements(By.CSS_SELECTOR, "input, select, textarea, button, meter"):
        assert browser.execute_script(
            "return arguments[0].labels?.[0]?.textContent || arguments[0].textContent", field
        )
    assert browser.execute_script("return document.documentElement.lang") == "en"


def test_nothing_comes_from_elsewhere() -> None:
    page = (Path(__file__).parents[3] / "rotq" / "serve" / "http" / "page.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
