"""Drive a headless Chromium over a pipe, with nothing but the standard library."""

import base64
import fcntl
import json
import os
import shutil
import subprocess

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
_SHIFT = 8


class Browser:
    """A browser with one page, ended by ``with``.

    Attributes:
        problems: what the page logged as an error or threw.
        requests: addresses of all that the page loaded.
    """

    def __init__(self, profile, width=1280, height=900, mobile=False):
        commands, ours_to_write = os.pipe()
        ours_to_read, answers = os.pipe()

        def use_3_and_4():  # the numbers that the browser expects
            high = [fcntl.fcntl(pipe, fcntl.F_DUPFD, 10) for pipe in (commands, answers)]
            for number, descriptor in zip((3, 4), high, strict=True):
                os.dup2(descriptor, number)

        options = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"]
        options += ["--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            [CHROMIUM, *options, "about:blank"],
            preexec_fn=use_3_and_4,
            pass_fds=(3, 4),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.write_to, self.read_from = ours_to_write, open(ours_to_read, "rb")  # noqa: SIM115
        self.buffer, self.number, self.session = b"", 0, None
        self.problems, self.requests = [], []
        (target,) = [
            target
            for target in self.ask("Target.getTargets")["targetInfos"]
            if target["type"] == "page"
        ]
        self.session = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.session = None
            self.ask("Browser.close")
        finally:
            os.close(self.write_to)
            self.read_from.close()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def ask(self, method, **params):
        """Send a command and wait for its answer; keep what the page says meanwhile."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer.get("method"), answer.get("params"))

    def _receive(self):
        while b"\0" not in self.buffer:
            read = self.read_from.read1(1 << 20)
            assert read, "the browser ended"
            self.buffer += read
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event, params):
        if event == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"])
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def run(self, script):
        """The value of an expression or, once it is there, of a promise."""
        result = self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path):
        """Load a page of msda.plot.explore and wait until it is drawn."""
        self.ask("Page.navigate", url=path.as_uri())
        self.run(
            "new Promise((done) => { const look = () => document.querySelector('[data-ready]')"
            " ? requestAnimationFrame(() => requestAnimationFrame(done)) : setTimeout(look, 20);"
            " look(); })"
        )

    def state(self):
        """The data attributes of the page."""
        return self.run("({...document.getElementById('page').dataset})")

    def key(self, key, shift=False):
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=_KEY_CODES[key],
                modifiers=_SHIFT if shift else 0,
            )

    def mouse(self, kind, x, y, pressed=False):
        """Move, press or release the mouse at a place of the image, given as shares of it."""
        frame = self.run(
            "(({left, top, width, height}) => [left, top, width, height])"
            "(document.getElementById('canvas').getBoundingClientRect())"
        )
        self.ask(
            "Input.dispatchMouseEvent",
            type=kind,
            x=frame[0] + x * frame[2],
            y=frame[1] + y * frame[3],
            button="left" if pressed or kind != "mouseMoved" else "none",
            buttons=1 if pressed else 0,
            clickCount=0 if kind == "mouseMoved" else 1,
        )

    def click(self, x, y):
        """Click at a place of the image, given as shares of it."""
        self.mouse("mousePressed", x, y, pressed=True)
        self.mouse("mouseReleased", x, y)

    def screenshot(self, path, dark=False, full=False):
        """Write a PNG of what is in view, or of the whole page."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))
