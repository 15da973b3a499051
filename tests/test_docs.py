"""The documentation is true: its code runs, its messages are those of the code, and its reference is complete."""

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import pytest

import peft_child
from peft_child import ChildTuningConfig

from .glue_data import save_model
from .ranks import forked
from .sft_data import save_language_model


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The drivers that write docs/results have tests of their own, which run such commands again.
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md"), *DOCS.glob("[!r]*/*.md"), *DOCS.glob("reference/*.md")])
CODE = ("python", "bash", "sh", "console")
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r"^(?P<fence>```+)(?P<language>[\w{}-]*)[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
ENCODERS = ("google-bert/bert-base-cased", "sentence-transformers/all-MiniLM-L6-v2")
LANGUAGE_MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct",)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    reason: str | None  # why it is not run


def blocks(page):
    """The blocks of code of a page, or the cells of a notebook."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text())["cells"]
        return [Block("python", "".join(cell["source"]), None) for cell in cells if cell["cell_type"] == "code"]
    found = [Block(each["language"], each["text"], each["reason"]) for each in BLOCK.finditer(page.read_text())]
    return [block for block in found if block.language in CODE]


def run_page(page, folder, connection):
    """Run the Python of a page from top to bottom, in a folder with stand-ins for what is on the Hub."""
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(ROOT))
    stand_in(folder)
    printed, error = io.StringIO(), None
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            namespace = {"__name__": "page"}
            for number, block in enumerate(blocks(Path(page))):
                if block.language == "python" and block.reason is None:
                    exec(compile(block.text, f"{page}, block {number + 1}", "exec"), namespace)
        except BaseException:
            error = traceback.format_exc()
    connection.send((error, printed.getvalue()))


def stand_in(folder):
    """Let the names of models and data on the Hub stand for tiny ones."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    places = dict.fromkeys(ENCODERS, save_model(folder / "encoder"))
    places |= dict.fromkeys(LANGUAGE_MODELS, save_language_model(folder / "language_model"))
    for loader in (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer):
        loader.from_pretrained = partial(_with_places, loader.from_pretrained, places)
    datasets.load_dataset = lambda *names: datasets.DatasetDict(
        {split: datasets.Dataset.from_list(ROWS[names[0]] * 100) for split in ("train", "validation", "test")}
    )
    if importlib.util.find_spec("trl"):
        import trl.trainer.sft_trainer as sft

        sft.create_model_from_path = partial(_with_places, sft.create_model_from_path, places)


def _with_places(load, places, name, *arguments, **settings):
    return load(places.get(str(name), name), *arguments, **settings)


ROWS = {
    "nyu-mll/glue": [
        {"sentence1": "the cat sat", "sentence2": f"a dog {end}", "label": int(end == "ran")} for end in ("ran", "sat")
    ]
    * 5,
    "openai/gsm8k": [{"question": f"w1 w{number} w3", "answer": f"w2 w{number}"} for number in range(3)],
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_code_is_run_or_says_why_not(page):
    for block in blocks(page):
        assert block.reason or block.language == "python", block.text


WITH_CODE = [page for page in (*PAGES, *NOTEBOOKS) if any(not block.reason for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page, tmp_path):
    for package in ("trl", "IPython"):
        if package in page.read_text():
            pytest.importorskip(package, reason=f"{package} is not installed")
    pytest.importorskip("datasets", reason="datasets is not installed")
    process, connection = forked(run_page, str(page), tmp_path)
    error, printed = connection.recv()
    process.join()
    assert error is None, f"{error}\n{printed}"


@cache
def configuration():
    """docs/conf.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_public_name():
    page = (DOCS / "reference" / "api.md").read_text()
    missing = [name for name in peft_child.__all__ if not re.search(rf":: peft_child\.{name}\b", page)]
    assert not missing
    assert "<!-- fields -->" in page


def test_the_reference_has_every_field_of_the_configuration():
    text = configuration().fields()
    for name in ChildTuningConfig.__annotations__:
        field = ChildTuningConfig.__dataclass_fields__[name]
        assert f"`{name} = {field.default!r}`\n: {field.metadata['help']}\n" in text


def test_the_reference_has_every_command_and_option():
    from typer.main import get_command

    from peft_child.cli.main import app

    assert "<!-- commands -->" in (DOCS / "reference" / "cli.md").read_text()
    text = configuration().commands()
    for name, command in get_command(app).commands.items():
        _, _, section = text.partition(f"## `peft-child {name}`")
        assert section, name
        section = section.partition("\n## ")[0]
        for parameter in command.params:
            assert all(option in section for option in parameter.opts if option.startswith("-")), (
                name,
                parameter.opts,
            )


def source_text():
    """The code as one line, with the strings that it writes in several pieces put together."""
    text = " ".join(source.read_text() for source in sorted((ROOT / "peft_child").rglob("*.py")))
    return re.sub(r'"\s+f?"', "", text)


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    headings = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) >= 20
    code = source_text()
    of_others = {
        *("KeyError: 'PEFT_CHILD'", "Target modules {...} not found in the base model"),  # PEFT
        "Weight transfer not configured",  # vLLM
    }
    for heading in headings:
        pieces = [piece for piece in re.split(r"'[^']*'|\.\.\.", heading) if len(piece) > 3]
        missing = [piece for piece in pieces if piece.strip() not in code]
        assert heading in of_others or not missing, heading


def test_pages_name_no_folder_of_a_machine():
    for page in PAGES:
        assert not re.search(r"/(?:work|root|home|tmp)/", page.read_text()), page


def test_every_setting_that_is_printed_as_json_is_valid():
    for page in PAGES:
        for text in re.findall(r"^```json\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            json.loads(text)


@pytest.mark.by_hand
@pytest.mark.slow
def test_the_site_works_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or pytest.skip("there is no Chromium")
    site = tmp_path / "site"
    build = [sys.executable, "-m", "sphinx", "-W", "-q", "-d", str(tmp_path / "doctrees"), str(DOCS), str(site)]
    subprocess.run(build, check=True)
    pages = sorted(site.glob("**/*.html"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=site))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    problems = []
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=quiet)
        page = browser.new_context(permissions=["clipboard-read", "clipboard-write"]).new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"{request.url} failed"))
        page.on("request", lambda request: problems.extend([] if request.url.startswith(address) else [request.url]))

        page.goto(f"{address}/index.html")
        page.fill("input[name=q]", "granularity")
        page.press("input[name=q]", "Enter")
        page.wait_for_selector("ul.search li a")
        assert page.locator("ul.search li").count() > 3

        page.goto(f"{address}/index.html")
        page.locator(".sidebar-tree a", has_text="Several adapters").click()
        assert page.locator("h1").first.inner_text().startswith("Several adapters")
        page.locator("div.highlight").first.hover()
        page.locator("button.copybtn").first.click()
        page.wait_for_timeout(200)
        assert "add_adapter" in page.evaluate("navigator.clipboard.readText()")

        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            for place in pages:
                page.goto(f"{address}/{place.relative_to(site)}")
                assert page.evaluate("document.documentElement.scrollWidth") <= width, (place, width)
                broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
                assert page.evaluate(broken) == 0, place
        browser.close()
    server.shutdown()
    assert not problems
