"""A headless Chromium for the tests of the page: open, wait, press, look."""

import contextlib
import json
import pathlib
import shutil

import pytest

CHROMIUM = "/usr/bin/chromium"
DRIVER = "/usr/bin/chromedriver"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
SECONDS = 20  # the longest wait for what should come at once
READY = """['work', 'token', 'page-error'].some(id => !document.getElementById(id).hidden)"""


class Tab:
    """A tab of the browser. Waits are for conditions in JavaScript, never for a time."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url, width=1200, height=900, **media):
        """Opens the page and waits until it has asked the server. media: features such as
        prefers_color_scheme="dark".
        """
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": n.replace("_", "-"), "value": v} for n, v in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(f"{url}/")
        self.until(READY)

    def js(self, script, *args):
        """What a script returns."""
        return self.driver.execute_script(script, *args)

    def until(self, condition, *args):
        """Waits until an expression is true; `args` are `arguments` in it. Returns its value."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, SECONDS, poll_frequency=0.02)
        try:
            return wait.until(lambda driver: driver.execute_script(f"return {condition}", *args))
        except TimeoutException:
            raise AssertionError(f"never: {condition} {args}\n{self.text('main')}") from None

    def text(self, name):
        """The visible text of an element by id."""
        return self.driver.find_element("id", name).text

    def texts(self, selector):
        """The visible texts of all elements that a selector finds."""
        return [node.text for node in self.driver.find_elements("css selector", selector)]

    def contents(self, selector):
        """The same with what only a screen reader is told."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return self.js(script, selector)

    def shown(self, name):
        return self.driver.find_element("id", name).is_displayed()

    def click(self, selector):
        self.driver.find_element("css selector", selector).click()

    def says(self, name, text):
        """Waits until an element's text holds this."""
        self.until(
            "document.getElementById(arguments[0]).textContent.includes(arguments[1])", name, text
        )

    def insert(self, name, text):
        """What pasting does: replaces a field's text in one step."""
        self.js("const e = document.getElementById(arguments[0]); e.focus(); e.select()", name)
        self.driver.execute_cdp_cmd("Input.insertText", {"text": text})

    def press(self, *keys):
        """Keys for whatever has the focus."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def focused(self):
        """The id, or else the text, of what has the focus."""
        return self.js("const e = document.activeElement; return e.id || e.textContent")

    def compress(self, text):
        """Puts a text in and compresses it."""
        self.insert("text", text)
        self.click("#compress")
        self.says("text-status", "became")

    def restore(self):
        self.click("#restore")
        self.says("restore-status", "Restored in")

    def ask(self, question, status="Answered."):
        """Asks and waits for all columns; returns the texts of the newest question's columns."""
        self.insert("question", question)
        self.click("#ask")
        self.until(
            "document.querySelector('#history h3')?.textContent === arguments[0]"
            " && document.getElementById('ask-status').textContent === arguments[1]",
            question,
            status,
        )
        return self.texts("#history > li:first-child .column")

    def complaints(self):
        """What the browser's console has, but for answers with an error status: scripts that
        failed, and what the Content-Security-Policy refused.
        """
        entries = self.driver.get_log("browser")
        network = "Failed to load resource"
        return [e["message"] for e in entries if network not in e["message"]]

    def accessibility(self):
        """[(role, name)] of what assistive technology is shown."""
        self.driver.execute_cdp_cmd("Accessibility.enable", {})
        nodes = self.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def imported(self, module, body, *args):
        """What a function body gives that has a module of the page as `m` and `args`."""
        script = f"""
            const done = arguments[arguments.length - 1];
            const args = JSON.parse(arguments[0]);
            import("/page/{module}").then(async (m) => {{ {body} }})
                .then(value => done({{value}}), error => done({{error: String(error.stack)}}));
        """
        answer = self.driver.execute_async_script(script, json.dumps(args))
        assert "error" not in answer, answer["error"]
        return answer["value"]


@contextlib.contextmanager
def browser(folder):
    """A tab of a new Chromium whose profile is in an empty folder. Skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    for program in (CHROMIUM, DRIVER):
        if not shutil.which(program):
            pytest.skip(f"needs {program}, which is not here")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={pathlib.Path(folder) / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    try:
        yield Tab(driver)
    finally:
        driver.quit()
