"""Make docs/card.png anew: kill mnist_torch_vanilla twice and photograph the card of its training.

python tools/picture.py [FILE.png] [--dark]
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FAULTS = "kill@step=100;kill@step=205"
WIDTH, HEIGHT = 700, 910
LIMIT = 150_000  # bytes


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--dark"]
    target = Path(arguments[0]).resolve() if arguments else REPO / "docs" / "card.png"
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser found: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        print(f"training, killed at {FAULTS} ...", flush=True)
        card = train(Path(scratch))
        target.parent.mkdir(exist_ok=True)
        photograph(browser, card, target, Path(scratch), "--dark" in sys.argv)
    print(f"{target}: {target.stat().st_size:,} bytes")
    if target.stat().st_size > LIMIT:
        sys.exit(f"that is more than {LIMIT:,}: make the picture smaller")


def train(scratch: Path) -> Path:
    """The card of a training that was killed twice."""
    env = {
        **os.environ,
        "FAULTS": FAULTS,
        "METAFLOW_USER": "gallery",
        "METAFLOW_HOME": str(scratch / "home"),
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(scratch),
        "METAFLOW_CARD_LOCALROOT": str(scratch / "cards"),
        "METAFLOW_DEFAULT_DATASTORE": "local",
        "METAFLOW_DEFAULT_METADATA": "local",
    }
    line = [sys.executable, str(REPO / "mnist_torch_vanilla" / "flow.py"), "run"]
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


if __name__ == "__main__":
    main()
