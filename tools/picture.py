"""Make an example's card.png anew: kill its training twice and photograph the card.

python tools/picture.py mnist_torch_vanilla
python tools/picture.py xgboost --faults "kill@step=25;kill@step=60"
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

REPO = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FAULTS = "kill@step=100;kill@step=205"
WIDTH, HEIGHT = 700, 1400  # the empty part below is cut off
MARGIN = 15
LIMIT = 150_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", help="the directory of one")
    parser.add_argument("--faults", default=FAULTS, help=f"where it dies; {FAULTS} unless given")
    parser.add_argument("--output", type=Path, help="another file than EXAMPLE/card.png")
    parser.add_argument("--dark", action="store_true", help="as a browser in dark mode shows it")
    given = parser.parse_args()
    flow = REPO / given.example / "flow.py"
    if not flow.is_file():
        sys.exit(f"there is no example {given.example!r}: {flow.name} is missing in it")
    target = (given.output or flow.with_name("card.png")).resolve()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser found: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        print(f"training, killed at {given.faults} ...", flush=True)
        card = train(flow, given.faults, Path(scratch))
        target.parent.mkdir(exist_ok=True)
        photograph(browser, card, target, Path(scratch), given.dark)
    print(f"{target}: {target.stat().st_size:,} bytes")
    if target.stat().st_size > LIMIT:
        sys.exit(f"that is more than {LIMIT:,}: make the picture smaller")


def train(flow: Path, faults: str, scratch: Path) -> Path:
    """The card of a training that was killed twice."""
    env = {
        **os.environ,
        "FAULTS": faults,
        "METAFLOW_USER": "gallery",
        "METAFLOW_HOME": str(scratch / "home"),
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(scratch),
        "METAFLOW_CARD_LOCALROOT": str(scratch / "cards"),
        "METAFLOW_DEFAULT_DATASTORE": "local",
        "METAFLOW_DEFAULT_METADATA": "local",
    }
    line = [sys.executable, str(flow), "run"]
    done = subprocess.run(line, cwd=scratch, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    shown = re.search(r"the card of the whole training: --hash (\w+)", done.stdout)
    if done.returncode or shown is None:
        sys.exit(f"the training failed or drew no card\n{done.stdout[-3000:]}")
    return next(scratch.glob(f"**/cards/blank-training-{shown[1]}*.html"))


def photograph(browser: str, card: Path, target: Path, scratch: Path, dark: bool) -> None:
    line = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--hide-scrollbars", "--run-all-compositor-stages-before-draw", "--virtual-time-budget=8000",
        f"--user-data-dir={scratch / 'browser'}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={target}",
        *(["--force-dark-mode"] if dark else []), card.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    if done.returncode or not target.exists():
        sys.exit(f"the browser made no picture\n{done.stderr[-2000:]}")
    with Image.open(target) as picture:
        page = picture.convert("RGB")
    empty = Image.new("RGB", page.size, page.getpixel((0, 0)))
    bottom = ImageChops.difference(page, empty).getbbox()[3]
    page.crop((0, 0, WIDTH, min(bottom + MARGIN, HEIGHT))).quantize(256).save(target, optimize=True)


if __name__ == "__main__":
    main()
