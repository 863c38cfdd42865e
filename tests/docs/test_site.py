"""The site builds without a warning; every link of it leads somewhere; nothing is fetched."""

import functools
import html.parser
import http.server
import inspect
import os
import pathlib
import posixpath
import queue
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("sphinx_book_theme")
pytest.importorskip("myst_nb")

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "docs"))

from sphinx.util.inventory import InventoryFile  # noqa: E402
from sphinx_psjax import docstrings, examples, mathml, public_names  # noqa: E402

SECONDS = 90  # for a build, on a machine that does nothing else
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync""".split()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    before = os.times().children_user
    run = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "html")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert os.times().children_user - before < SECONDS
    return folder / "html"


class Page(html.parser.HTMLParser):
    """What a page refers to, and what may be referred to in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in ("script", "img", "iframe", "source") and attrs.get("src"):
            self.loaded.append(attrs["src"])
        if tag == "link" and attrs.get("rel") not in ("canonical", "search", "next", "prev"):
            self.loaded.append(attrs["href"])


def pages_of(folder):
    """`{"api/index.html": Page, ...}`."""
    return {
        path.relative_to(folder).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.html"))
        if "_static" not in path.relative_to(folder).parts
    }


def is_outside(target):
    return re.match(r"(https?:)?//|mailto:|data:", target) is not None


def broken(folder):
    """`[(page, reference), ...]` of local references that lead nowhere."""
    pages, found = pages_of(folder), []
    for name, page in pages.items():
        for target in [*page.links, *page.loaded]:
            if is_outside(target):
                continue
            parts = urllib.parse.urlsplit(target)
            path = urllib.parse.unquote(parts.path)
            other = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
            other = other if path else name
            anchor = urllib.parse.unquote(parts.fragment)
            missing = not (folder / other).is_file()
            if missing or (anchor and other in pages and anchor not in pages[other].anchors):
                found.append((name, target))
    return found


def test_every_local_link_and_anchor_is_there(site):
    assert len(pages_of(site)) > 20
    assert not broken(site)


def test_a_broken_link_is_found(tmp_path):
    text = '<a href="b.html#here">x</a><a href="#no"></a><img src="no.png"><a href="c.html"></a>'
    (tmp_path / "a.html").write_text(text)
    (tmp_path / "b.html").write_text('<p id="here"><a href="https://example.org/">y</a></p>')
    assert broken(tmp_path) == [("a.html", "#no"), ("a.html", "c.html"), ("a.html", "no.png")]


def test_nothing_is_fetched_from_outside(site):
    loaded = {(name, x) for name, page in pages_of(site).items() for x in page.loaded}
    assert loaded
    assert not [pair for pair in loaded if is_outside(pair[1])]
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not [style for style in styles if re.search(r"(@import|url\()\s*[\"']?https?:", style)]


def test_every_public_name_has_an_entry(site):
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", posixpath.join)
    described = {name for kind in inventory.values() for name in kind}
    assert not set(public_names.public()) - described
    assert not set(public_names.MODULES) - described


def test_every_public_name_has_an_example_that_runs():
    """In its docstring, in that of a method, or in `docs/api/examples`; test_pages.py runs it."""
    missing = []
    for name, value in public_names.public().items():
        parts = vars(value).values() if inspect.isclass(value) else ()
        texts = [value.__doc__, *(getattr(part, "__doc__", None) for part in parts)]
        documented = any(isinstance(text, str) and ">>>" in text for text in texts)
        if not documented and examples.of(public_names.entry(name)) is None:
            missing.append(name)
    assert not missing


def test_every_example_is_of_a_public_name():
    for module in public_names.MODULES:
        assert set(examples.read(module).by_name) <= set(public_names.public())


def test_the_modules_of_the_reference_are_all_of_them():
    assert {*public_names.submodules("psjax"), "psjax"} == set(public_names.MODULES)


def test_the_outputs_of_the_notebooks_are_shown(site):
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = (site / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert "cell_output" in text, path.stem
        assert "<img" in text


# ------------------------------------------------------------------------------------- docstrings


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("of `x`s", r"of ``x``\ s"),
        ("as `psjax.select` says", "as :py:obj:`psjax.select <psjax.select>` says"),
        ("is $x_1$, `$`", "is :math:`x_1`, ``$``"),
        ("[a b](https://c.d)", "`a b <https://c.d>`_"),
        (">>> f(`x`)\n`y`", ">>> f(`x`)\n`y`"),
        ("So::\n\n  a = `b`\n\nand `c`", "So::\n\n  a = `b`\n\nand ``c``"),
        ("*a* and **b**", "*a* and **b**"),
    ],
)
def test_a_docstring_becomes_restructured_text(ours, theirs):
    assert docstrings.converted(ours, "psjax.x") == theirs


def test_a_table_becomes_a_list_table():
    text = docstrings.converted("| a | b |\n|---|---|\n| `c` | d |", "psjax.x")
    assert text.split("\n")[0] == ".. list-table::"
    assert "   * - ``c``" in text


def test_mathematics_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="nonsense"):
        mathml.convert(r"\nonsense x", as_block=False)


def test_an_accented_letter_has_its_subscript_beside_it():
    text = mathml.convert(r"\hat f_e", as_block=False)
    assert re.search(r"<msub>\s*<mover", text)
    assert "munder" not in text


# ------------------------------------------------------------------------------------ in a browser

LOOK = """<!doctype html><title>look</title><body><script>
const pages = %s, width = %d, found = [];
const wait = ms => new Promise(done => setTimeout(done, ms));
async function open(url) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  const loaded = new Promise(done => { frame.onload = done; });
  frame.src = url;
  document.body.append(frame);
  await loaded;
  return frame;
}
async function look() {
  for (const url of pages) {
    const frame = await open(url), page = frame.contentDocument, root = page.documentElement;
    for (const image of page.images) image.loading = "eager";
    await Promise.all([...page.images].map(image => image.decode().catch(() => null)));
    const math = [...page.querySelectorAll("math")];
    found.push([url, root.scrollWidth, root.clientWidth, page.images.length,
      [...page.images].filter(image => image.naturalWidth === 0).length,
      math.length, math.filter(node => !node.closest(":not(details[open]) > .hidden")
        && node.getBoundingClientRect().height < 4).length].join(" "));
    frame.remove();
  }
  const frame = await open("search.html?q=scatter_mean");
  let results = [];
  for (let i = 0; i < 100 && !results.length; i++) {
    await wait(100);
    results = [...frame.contentDocument.querySelectorAll("#search-results li a")];
  }
  found.push(["search", ...results.map(a => a.getAttribute("href"))].join(" "));
  await fetch("found", {method: "POST", body: found.join("\\n")});
}
look();
</script></body>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what a page has found."""

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.found.put(self.rfile.read(length).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server(site):
    """The site, served on this machine alone."""
    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.found = queue.Queue()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_page(site, server, tmp_path, width):
    """Mathematics is drawn, pictures are loaded, search works, no page is wider than its window."""
    names = [name for name in pages_of(site) if name != "search.html"]
    look = site / f"look{width}.htm"
    look.write_text(LOOK % (names, width), encoding="utf-8")
    address = f"http://127.0.0.1:{server.server_address[1]}/{look.name}"
    window = [f"--user-data-dir={tmp_path}", f"--window-size={width + 40},1000"]
    with (tmp_path / "log").open("w") as log:
        browser = subprocess.Popen([BROWSER, *FLAGS, *window, address], stdout=log, stderr=log)
        try:
            *rows, search = server.found.get(timeout=180).split("\n")
        finally:
            browser.terminate()
            browser.wait(timeout=30)
    assert len(rows) == len(names)
    looked = [(row.split(" ")[0], *map(int, row.split(" ")[1:])) for row in rows]
    too_wide = [(name, needed, given) for name, needed, given, *_ in looked if needed > given]
    assert not too_wide
    assert not [row for row in looked if row[4] or row[6]]  # pictures, formulas not shown
    pictures, formulas = sum(row[3] for row in looked), sum(row[5] for row in looked)
    assert pictures > 10
    assert formulas > 100
    assert "api/psjax.html#psjax.Selection.scatter_mean" in search
