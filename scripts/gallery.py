"""Make the gallery: reports of well-known networks, an index of them, and the pictures of the README.

Writes ``reports/gallery/NAME/report.html`` and ``summary.json`` for each network, ``index.html``, and what the pages
share. The ResNet-56 is a trained one, scored and measured on CIFAR-10; it needs the data (see ``--data``). All others
have random weights and are scored on noise, which their pages say: they show what the network looks like, not what a
trained one could spare.

The decision that is not obvious: a page of archscan is one file with style, scripts and Plotly in it, 2 MB each. In the
gallery these lie beside the pages, once: ``plotly.js`` puts Plotly's script where a page has it otherwise.

    python scripts/gallery.py                       # all networks
    python scripts/gallery.py resnet50 densenet121  # these; the index has the others that are there as well
    python scripts/gallery.py --pictures            # then also reports/images/*.png, by headless Chromium
"""

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import archscan  # noqa: F401 - before anything that imports torchvision

from jinja2 import Environment  # isort: skip

from archscan.options import (  # isort: skip
    BudgetOptions,
    DataOptions,
    ModelOptions,
    OutputOptions,
    RunOptions,
    SlimOptions,
    silent,
)
from archscan.pipeline import slim_command  # isort: skip
from archscan.report import views  # isort: skip
from archscan.report.html import SCRIPTS, STYLES, render_html  # isort: skip
from archscan.report.model import SUMMARY_FILE, Report, json_text, read_report  # isort: skip
from archscan.report.page import joined, packed_plotly  # isort: skip

from picture import picture  # isort: skip

GALLERY, IMAGES = Path("reports/gallery"), Path("reports/images")
PLOTLY, STYLE, SCRIPT = "plotly.js", "style.css", "script.js"
RATIO = 0.6
PICTURE_SCALE = 1.25
"""Pixels of a picture per pixel of the page: sharp enough, and small."""

TERMINAL_WIDTH, TERMINAL_HEIGHT = 900, 1000
"""In pixels of the page; what is below does not fit a README."""


@dataclass(frozen=True)
class Entry:
    """A network of the gallery: its name there, what archscan opens, and whether it is the trained one."""

    name: str
    model: str
    trained: bool = False


ENTRIES = (
    Entry("resnet56-cifar10", "reference:resnet56_cifar", trained=True),
    Entry("resnet50", "timm:resnet50"),
    Entry("mobilenetv3", "timm:mobilenetv3_large_100"),
    Entry("efficientnet-b0", "timm:efficientnet_b0"),
    Entry("convnext-tiny", "timm:convnext_tiny"),
    Entry("densenet121", "timm:densenet121"),
    Entry("regnety-016", "timm:regnety_016"),
    Entry("hrnet-w18", "timm:hrnet_w18"),
)

INDEX = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline' 'self' file:">
<title>archscan · gallery</title>
<link rel="stylesheet" href="{{ style }}">
<style>
thead td { border-bottom-width: 2px; }
</style>
</head>
<body>
<main>
<header>
  <p class="eyebrow">archscan gallery</p>
  <h1>What the reports look like</h1>
  <p class="verdict">{{ rows | length | plural("network") }}, each slimmed to at most {{ ratio | percent }} of its
MACs.</p>
</header>
<p class="note">Networks with random weights were scored on noise: their pages show how a network is built and where it
spends, not what a trained one could spare. Each page opens offline; 1 MAC = 1 FLOP.</p>
<div class="scroll" role="region" aria-label="Networks" tabindex="0"><table>
<thead><tr><th scope="col">network</th><th scope="col" class="left">weights</th><th scope="col">dense MACs</th>\
<th scope="col">kept</th><td class="wide"></td><th scope="col" class="wide">parameters kept</th>\
<th scope="col" class="wide">groups</th><th scope="col" class="wide">findings</th>\
<th scope="col">top-1</th></tr></thead>
<tbody>
{% for name, report in rows %}
<tr><td class="name"><a href="{{ name }}/report.html"><code>{{ name }}</code></a></td>\
<td class="left">{{ report.weights.kind if report.weights.kind == "random" else "trained" }}</td>\
<td>{{ report.before.macs | si }}</td><td>{{ report.keep_ratio.macs | percent }}</td>\
<td class="barcell wide"><span class="bar"><i style="width:{{ 100 * report.keep_ratio.macs }}%"></i></span></td>\
<td class="wide">{{ report.keep_ratio.params | percent }}</td><td class="wide">{{ report.groups | length }}</td>\
<td class="wide">{{ report.findings | length }}</td>\
<td>{{ (report.accuracy.before | percent ~ " → " ~ report.accuracy.after | percent) if report.accuracy else "-" }}</td>\
</tr>
{% endfor %}
</tbody>
</table></div>
<footer class="note">Made by <code>python scripts/gallery.py</code>; the weights are not kept.</footer>
</main>
</body>
</html>
"""


def options_of(entry: Entry, folder: Path, samples: int | None, threads: int | None, *, latency: bool) -> SlimOptions:
    """Say what to do with a network; the trained one's files are named as they lie in the folder of the data."""
    real = DataOptions("cifar10-train.zip", samples or 512, "cifar10-val.zip", batch_size=64)
    noise = DataOptions(samples=samples)
    typed = [entry.model, f"--target-flops {RATIO:g}", "--weights random"]
    if entry.trained:
        typed[2] = "--weights resnet56_cifar10.safetensors"
        typed.append(f"--data {real.source} --samples {real.samples} --eval-data {real.eval_source} --batch-size 64")
    elif samples:
        typed.append(f"--samples {samples}")
    return SlimOptions(
        model=ModelOptions(entry.model, "resnet56_cifar10.safetensors" if entry.trained else "random"),
        budget=BudgetOptions("macs", RATIO),
        data=real if entry.trained else noise,
        run=RunOptions("cpu", threads),
        output=OutputOptions(folder, quiet=True),
        command_line=" ".join(["archscan", *typed, *(["--latency"] if latency else [])]),
        latency_batch=1 if latency else None,
    )


def make(entry: Entry, gallery: Path, data: Path, options: SlimOptions) -> Report:
    """Slim one network and keep what is worth keeping, in place of what was kept before."""
    with contextlib.chdir(data) if entry.trained else contextlib.nullcontext():
        report = slim_command(options, silent).report
    folder = gallery / entry.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / SUMMARY_FILE).write_text(json_text(report), encoding="utf-8")
    return report


def shared(page: str) -> str:
    """Take style, scripts and Plotly out of a page, and let them come from the files beside the folders."""
    moved = {
        f"<style>\n{joined(STYLES)}</style>": f'<link rel="stylesheet" href="../{STYLE}">',
        f'id="plotly">{packed_plotly()}</script>': f'id="plotly"></script>\n<script src="../{PLOTLY}"></script>',
        f"<script>\n{_script()}</script>": f'<script src="../{SCRIPT}"></script>',
        "script-src 'unsafe-inline'": "script-src 'unsafe-inline' 'self' file:",
        "style-src 'unsafe-inline'": "style-src 'unsafe-inline' 'self' file:",
    }
    for inline, beside in moved.items():
        if page.count(inline) != 1:
            raise ValueError("the page is not built as the gallery expects; see archscan/report/base.html.j2")
        page = page.replace(inline, beside)
    return page


def _script() -> str:
    return f'"use strict";\n{joined(SCRIPTS)}'


def write_pages(gallery: Path) -> list[tuple[str, Report]]:
    """Write the page of every summary that is there, what they share, and the index."""
    names = [entry.name for entry in ENTRIES if (gallery / entry.name / SUMMARY_FILE).is_file()]
    rows = [(name, read_report(gallery / name / SUMMARY_FILE)) for name in names]
    for name, report in rows:
        (gallery / name / "report.html").write_text(shared(render_html(report)), encoding="utf-8")
    fill = f'document.getElementById("plotly").textContent = "{packed_plotly()}";\n'
    for name, text in ((PLOTLY, fill), (STYLE, joined(STYLES)), (SCRIPT, _script())):
        (gallery / name).write_text(text, encoding="utf-8")
    environment = Environment(autoescape=True)
    environment.filters.update(percent=views.percent, si=views.si, plural=views.plural)
    index = environment.from_string(INDEX).render(rows=rows, style=STYLE, ratio=RATIO)
    (gallery / "index.html").write_text(index, encoding="utf-8")
    return rows


def take_pictures(gallery: Path, images: Path, rows: Sequence[tuple[str, Report]]) -> None:
    """Photograph pages and terminal with Chromium, for the README."""
    from playwright.sync_api import sync_playwright

    images.mkdir(parents=True, exist_ok=True)
    first, report = rows[0]
    page_of = {"report": (first, "header"), "network": ("resnet50", "#network"), "findings": (first, "#findings")}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 860}, device_scale_factor=PICTURE_SCALE)
        for picture_name, (name, place) in page_of.items():
            file = gallery / name / "report.html"
            if not file.is_file():
                continue
            page.goto(file.resolve().as_uri())
            page.wait_for_selector("#treemap .main-svg")
            if place == "header":
                page.screenshot(path=images / f"{picture_name}.png")
            else:
                page.locator(place).screenshot(path=images / f"{picture_name}.png")
        page.goto((gallery / "index.html").resolve().as_uri())
        page.locator("main").screenshot(path=images / "gallery.png")
        shown = Path("reports") / f"{first}-flops{RATIO:g}"
        drawn = picture(report, shown, width=100, title=f"archscan {report.model}")
        page.set_content(f'<body style="margin:0"><div style="width:{TERMINAL_WIDTH}px">{drawn}</div></body>')
        page.set_viewport_size({"width": TERMINAL_WIDTH, "height": TERMINAL_HEIGHT})
        page.screenshot(path=images / "terminal.png")
        browser.close()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [entry.name for entry in ENTRIES]
    parser.add_argument("networks", nargs="*", choices=[*names, []], help="(default: all)", metavar="NAME")
    data = Path(os.environ.get("ARCHSCAN_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=data, help="folder of CIFAR-10 and its trained ResNets")
    parser.add_argument("--samples", type=int, help="images to score on (default: 512 real ones, 32 of noise)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--latency", action="store_true", help="measure time too; on a machine that does nothing else")
    parser.add_argument("--output", type=Path, default=GALLERY)
    parser.add_argument("--only-pages", action="store_true", help="slim nothing; make the pages of what is there anew")
    parser.add_argument("--pictures", action="store_true", help="take the pictures of the README too")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where pictures go (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Make it."""
    typed = parse()
    gallery = typed.output.resolve()
    for entry in ENTRIES:
        if typed.only_pages or (typed.networks and entry.name not in typed.networks):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            options = options_of(entry, Path(temporary) / "out", typed.samples, typed.threads, latency=typed.latency)
            report = make(entry, gallery, typed.data, options)
        print(f"{entry.name}: {views.verdict(report)} ({sum(report.seconds.values()):.0f} s)", flush=True)
    rows = write_pages(gallery)
    size = sum(file.stat().st_size for file in gallery.rglob("*") if file.is_file())
    print(f"{len(rows)} reports, {size / 1e6:.1f} MB: {typed.output / 'index.html'}")
    if typed.pictures:
        take_pictures(gallery, typed.images, rows)


if __name__ == "__main__":
    main()
