"""Opens every page of a built site in a headless Chromium and lists what a reader would stumble over.

    python tests/check_site.py                              # _docs/ as `make docs` left it
    python tests/check_site.py FOLDER extract.html masks    # only these pages
    python tests/check_site.py --pictures OUT --dark        # and a picture of every page in both widths

The site is served from a port of this machine, as readers get it, whichever build made it. Looked for, at the width of
a desk and of a phone: errors on the console, pages that scroll sideways, code that is cut off, formulas that stayed
source text or whose kinds of letters look alike, pictures that are missing or have no alternative text, definitions
without their methods or parameters. Links and their anchors are followed in the files, and the search has to find
functions. The exit code is 1 where something was found, 3 where no browser or no site is there.
"""

import argparse
import base64
import contextlib
import functools
import http.server
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

WIDTHS = {"desk": 1280, "phone": 390}
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
         "--remote-debugging-port=0", "--remote-allow-origins=*"]

HERE = "http://127.0.0.1:" # where the site is served
LOOK = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


@dataclass
class Page:
    "What one file links to and what can be linked to in it"

    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)


class Reader(HTMLParser):
    "Collects links and anchors of a page"

    def __init__(self):
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.page.anchors |= {value for key in ("id", "name") if (value := attributes.get(key))}
        for key in ("href", "src"):
            if attributes.get(key) and tag != "base": self.page.links.append(attributes[key])


def read_page(path: Path) -> Page:
    "Links and anchors of one file"
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader.page


def broken_links(site: Path) -> dict[str, list[str]]:
    "Links inside the site that lead nowhere, by page"
    pages = {path.resolve(): read_page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}
    found: dict[str, list[str]] = {}
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target /= "index.html"
            anchor = unquote(parts.fragment)
            if not target.exists(): problem = f"link to nothing: {link}"
            elif anchor and target in pages and anchor not in pages[target].anchors: problem = f"no such anchor: {link}"
            else: continue
            found.setdefault(path.relative_to(site.resolve()).as_posix(), []).append(problem)
    return found


class Browser:
    "One tab of one headless browser, spoken to over its debugging socket"

    def __init__(self, program: str):
        import websocket

        self.folder = tempfile.mkdtemp(prefix="check_site_")
        command = [program, *FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port, path = self.address()
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=60, suppress_origin=True)
        self.sent, self.events, self.session = 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"): self.call(f"{domain}.enable")

    def address(self) -> list[str]:
        "Port and path of the socket, which the browser writes into its folder when it listens"
        file = Path(self.folder) / "DevToolsActivePort"
        for _ in range(600):
            if file.exists() and len(lines := file.read_text().split()) == 2: return lines
            if self.process.poll() is not None: break
            time.sleep(0.1)
        self.close()
        raise RuntimeError("the browser did not start: run it by hand with --headless to see why")

    def call(self, method: str, **parameters) -> dict:
        "Ask the browser for something and wait for the answer; what it reports meanwhile is kept"
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (answer := json.loads(self.socket.recv())).get("id") != self.sent: self.events.append(answer)
        if "error" in answer: raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def wait(self, event: str) -> None:
        "Until the browser has reported an event"
        while not any(e.get("method") == event for e in self.events): self.events.append(json.loads(self.socket.recv()))

    def evaluate(self, expression: str):
        "The value of a JavaScript expression in the page"
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer: raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def width(self, pixels: int) -> None:
        "Make the window as wide as a screen; narrow ones are telephones"
        size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def open(self, address: str) -> None:
        "Load a page and let its scripts run"
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait("Page.loadEventFired")
        self.settle()

    def settle(self) -> None:
        "Until the page has been drawn twice"
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def complaints(self) -> list[str]:
        "Errors that the page has reported since it was opened"
        found = []
        for event in self.events:
            match event.get("method"), event.get("params", {}):
                case "Runtime.exceptionThrown", {"exceptionDetails": details}:
                    found.append(details.get("exception", {}).get("description", details["text"]).splitlines()[0])
                case "Runtime.consoleAPICalled", {"type": "error" | "assert", "args": values}:
                    found.append(" ".join(str(v.get("value", v.get("description"))) for v in values))
                case "Log.entryAdded", {"entry": {"level": "error", "text": text, **rest}}:
                    found.append(f"{text} {rest.get('url', '')}".strip())
                case "Network.requestWillBeSent", {"request": {"url": url}} if url.startswith("http"):
                    if not url.startswith(HERE): found.append(f"fetched from a network: {url}")
        return [f"console: {text[:300]}" for text in dict.fromkeys(found)]

    def picture(self, path: Path, full: bool = True) -> None:
        "Save what is shown"
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        with contextlib.suppress(Exception): self.socket.close()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired): self.process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)


def find_browser() -> str | None:
    "A Chromium on the PATH, or None"
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves files and says nothing"

    def log_message(self, *arguments): pass


@contextlib.contextmanager
def served(site: Path):
    "The address of a folder for as long as one needs it"
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{HERE}{server.server_address[1]}"
        server.shutdown()


def page_problems(browser: Browser, address: str, picture: Path | None = None) -> list[str]:
    "What is wrong with one page at each width; pictures of it get the width behind their name"
    problems: dict[str, list[str]] = {}
    for i, (screen, pixels) in enumerate(WIDTHS.items()):
        browser.width(pixels)
        browser.open(address) if i == 0 else browser.settle()
        for problem in browser.evaluate(LOOK): problems.setdefault(problem, []).append(screen)
        if picture: browser.picture(picture.with_name(f"{picture.name}_{screen}.png"))
    return browser.complaints() + [f"{p} ({', '.join(screens)})" for p, screens in problems.items()]


SEARCHED = ["compose", "decompose", "fit"] # functions that readers look for


def found_by_search(browser: Browser, site: Path, address: str, word: str) -> list[str]:
    "What the site's own search leads to for a word, the first results"
    if (site / "search.json").exists(): # Quarto: sections with their titles, searched in the page
        browser.open(f"{address}/index.html?q={word}&show-results=1")
        results = ".aa-Item a"
    else: # Sphinx
        browser.open(f"{address}/search.html?q={word}")
        results = "#search-results li a"
    for _ in range(100):
        if found := browser.evaluate(f"[...document.querySelectorAll('{results}')].map(e => e.href)"): return found
        time.sleep(0.1)
    return []


def search_problems(browser: Browser, site: Path, address: str) -> list[str]:
    "Whether the search finds functions by their names"
    if not any((site / name).exists() for name in ("search.json", "searchindex.js")): return []
    return [f"the search does not lead to the function {word!r}" for word in SEARCHED
            if not any(link.endswith(f"#{word}") for link in found_by_search(browser, site, address, word))]


def check(site: Path, program: str, only: list[str] = (), pictures: Path | None = None, dark: bool = False) -> dict:
    "What is wrong with a site, by page"
    paths = [p for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]
    if only: paths = [p for p in paths if p.relative_to(site).as_posix().removesuffix(".html") in
                      {name.removesuffix(".html") for name in only}]
    if not paths: raise FileNotFoundError(f"no page of {site} has one of these names: {', '.join(only)}")
    found = {} if only else broken_links(site)
    browser = Browser(program)
    try:
        if dark: browser.call("Emulation.setEmulatedMedia",
                              features=[{"name": "prefers-color-scheme", "value": "dark"}])
        with served(site) as address:
            for path in paths:
                name = path.relative_to(site).as_posix()
                problems = page_problems(browser, f"{address}/{name}", pictures and (pictures / name).with_suffix(""))
                if problems: found[name] = found.get(name, []) + problems
            if not only and (problems := search_problems(browser, site, address)): found["search"] = problems
    finally:
        browser.close()
    return found


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("site", nargs="?", type=Path, default=Path(__file__).parents[1] / "_docs")
    arguments.add_argument("pages", nargs="*", help="names of pages; all without them")
    arguments.add_argument("--pictures", type=Path, help="folder for a picture of every page")
    arguments.add_argument("--dark", action="store_true", help="as on a screen that prefers dark colours")
    given, program, start = arguments.parse_args(), find_browser(), time.time()
    if not (given.site / "index.html").exists(): print(f"no site in {given.site}: run make docs", file=sys.stderr)
    elif not program: print(f"no browser on the PATH; looked for {', '.join(BROWSERS)}", file=sys.stderr)
    else:
        found = check(given.site, program, given.pages, given.pictures, given.dark)
        for page, problems in found.items(): print(page, *problems, sep="\n    ")
        print(f"{sum(map(len, found.values()))} problems, {time.time() - start:.0f} s")
        return 1 if found else 0
    return 3


if __name__ == "__main__":
    sys.exit(main())
