"""``make screenshots``: MLflow's pages of the suite's runs, in a real browser, as pictures for the README.

It serves what ``make suite`` left, opens the pages in Chromium and takes a picture of each once it shows what
it is to show. Needs Chromium (``apt-get install chromium``; another path by CHROMIUM) and nothing that the
project does not have: Chromium is driven over its own protocol.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cluster.tracking.views import CHARTS, SCORES, VIEW
from tests.helpers.services import free_port
from tests.scripts.suite import RECORD, ROOT

ASSETS = Path(__file__).resolve().parents[2] / ".github" / "assets"
WIDTH, HEIGHT = 1600, 900
#: Seconds that a page has to show what it is to show; a busy machine needs most of them.
PATIENCE_S = 300.0
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-port=0",
)
#: The pages remember what a person has closed; this person has closed what is not about runs.
CLOSED = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""
#: Key of the view of two runs.
PAIR = "pair"
MAX_BYTES = 300_000


class Page:
    """A page of a browser."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._last = socket, 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A call of Chromium's protocol."""
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": parameters})
        while True:
            answer: dict[str, Any] = await self._socket.receive_json(timeout=PATIENCE_S)
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    async def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    async def wait_for(self, *texts: str) -> None:
        """Waits until the page shows all the texts, and a moment more."""
        deadline = time.monotonic() + PATIENCE_S
        while missing := [
            text for text in texts if text not in (await self.value("document.body.innerText") or "")
        ]:
            if time.monotonic() > deadline:
                sys.exit(f"error: the page shows no {missing}")
            await asyncio.sleep(0.5)
        await asyncio.sleep(3)

    async def hide_path(self) -> None:
        """Hides where an artifact lies on this machine, which is nobody's business."""
        await self.value(
            "[...document.querySelectorAll('*')].filter(e => e.innerText?.trim().startsWith('Path:'))"
            ".forEach(e => { e.style.visibility = 'hidden'; })"
        )

    async def picture(self, path: Path) -> None:
        """Writes what is seen, in at most 256 colours."""
        shot = await self.call("Page.captureScreenshot", format="png")
        image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
        image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        size = path.stat().st_size
        assert size < MAX_BYTES, f"{path} has {size:,} bytes"
        sys.stderr.write(f"{path}: {size:,} bytes\n")


@contextlib.asynccontextmanager
async def browser(program: str) -> AsyncIterator[Page]:
    """Chromium with one empty page."""
    import aiohttp

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        size = f"--window-size={WIDTH},{HEIGHT}"
        line = [program, *FLAGS, size, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = await _port(Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    [target] = [one for one in await answer.json() if one["type"] == "page"]
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    await page.call("Page.enable")
                    await page.call("Page.addScriptToEvaluateOnNewDocument", source=CLOSED)
                    shape = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
                    await page.call("Emulation.setDeviceMetricsOverride", **shape)
                    yield page
        finally:
            process.terminate()
            process.wait(60)


async def _port(file: Path) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists() or len(file.read_text().split()) < 2:
        assert time.monotonic() < deadline, "Chromium does not start"
        await asyncio.sleep(0.2)
    return int(file.read_text().split()[0])


@contextlib.contextmanager
def server(root: Path) -> Iterator[str]:
    """``mlflow ui`` over the runs below a root; yields its address."""
    port = free_port()
    mlflow = Path(sys.executable).with_name("mlflow")
    line = [mlflow, "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    line += ["--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # Seven more processes otherwise, for jobs that nobody gives it.
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(line, env=os.environ | settings, start_new_session=True, **quiet)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            assert process.poll() is None, "the MLflow server has ended"
            assert time.monotonic() < deadline, "the MLflow server does not answer"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        # With the processes that it has started.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


async def take(address: str, program: str, record: dict[str, Any], experiment: str, folder: Path) -> None:
    """All pictures."""
    runs: dict[str, str] = record["runs"]
    mode = "workflowType=machine_learning"
    base = f"{address}/#/experiments/{experiment}/runs"
    pair = pair_of(runs)
    async with browser(program) as page:

        async def show(name: str, url: str, *texts: str) -> None:
            # Away first: a change after the # alone does not load the page anew.
            await page.call("Page.navigate", url="about:blank")
            await page.call("Page.navigate", url=url)
            await page.wait_for(*texts)
            await page.hide_path()
            await page.picture(folder / f"mlflow-{name}.png")

        await show("runs", f"{base}?viewStateShareKey={SCORES}&{mode}", *runs, "test/t2v/R1")
        await show("suite", f"{base}/{record['suite']}?{mode}", "text → video R@1")
        table = "artifacts/figures/table.png"
        await show("difference", f"{base}/{record['comparison']}/{table}?{mode}", "table.png", "Path:")
        await show("run", f"{base}/{runs[pair[1]]}?{mode}", "text → video")
        figure = "artifacts/figures/best-and-worst-test.png"
        await show("figures", f"{base}/{runs[pair[1]]}/{figure}?{mode}", "best-and-worst-test.png", "Path:")
        charts = f"viewStateShareKey={PAIR}&compareRunsMode=CHART"
        await show("compare", f"{base}?{charts}&{mode}", *pair, "test/t2v/R1")


def pair_of(runs: Mapping[str, str]) -> list[str]:
    """The names of the two runs that are compared: baseline and GARE on one benchmark."""
    benchmark = next(iter(runs)).partition("/")[0]
    return [f"{benchmark}/{model}-0" for model in ("baseline", "gare")]


def save_pair(store: Any, experiment: str, pair: Sequence[str]) -> None:
    """A view as a person would save it: the charts, of two runs alone."""
    tags = store.get_experiment(experiment).tags
    view = json.loads(tags[VIEW + CHARTS])
    benchmark = pair[0].partition("/")[0]
    chosen = f"tags.benchmark = '{benchmark}' AND tags.seed = '0'"
    state = json.loads(view["state"]) | {"searchFilter": chosen}
    content = view | {"name": "baseline and GARE", "state": json.dumps(state)}
    store.set_experiment_tag(experiment, VIEW + PAIR, json.dumps(content))


def main() -> None:
    """Serves, opens, takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="outputs of make suite")
    parser.add_argument("--folder", type=Path, default=ASSETS, help="where the pictures go")
    options = parser.parse_args()
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if not program:
        sys.exit("error: there is no Chromium (accepted: apt-get install chromium, or its path as CHROMIUM)")
    root = options.root.resolve()
    record = json.loads((root / RECORD).read_text()) if (root / RECORD).exists() else {}
    if "suite" not in record:
        sys.exit(f"error: {root}: holds no finished suite (accepted: make suite first)")
    from cluster.tracking import resolve_tracking_uri
    from cluster.tracking.client import client

    store = client(resolve_tracking_uri("sqlite:///mlflow.db", str(root)))
    experiment = store.get_run(record["suite"]).info.experiment_id
    save_pair(store, experiment, pair_of(record["runs"]))
    options.folder.mkdir(parents=True, exist_ok=True)
    with server(root) as address:
        asyncio.run(take(address, program, record, experiment, options.folder))


if __name__ == "__main__":
    main()
