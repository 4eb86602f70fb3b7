"""The table of examples in the README, made from every example.toml. ``--check`` says whether it is current."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- index: made by tools/index.py -->", "<!-- /index -->"
LEVELS = ["starter", "intermediate", "advanced"]


def table() -> str:
    """The rows, easiest level first."""
    found = [(path.parent.name, tomllib.loads(path.read_text())) for path in ROOT.glob("*/example.toml")]
    found.sort(key=lambda item: (LEVELS.index(item[1]["level"]), item[0] != "mnist_torch_vanilla", item[0]))
    rows = ["| example | level | frameworks | shows | minutes |", "|---|---|---|---|---|"]
    for name, toml in found:
        shows = ", ".join(f"`{feature}`" for feature in toml["shows"])
        cells = [
            f"[{toml['title']}]({name}/)",
            toml["level"],
            ", ".join(toml["frameworks"]),
            shows,
            str(toml["minutes"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    fresh = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv:
        if fresh != text:
            print("README.md: the table of examples is stale; run python tools/index.py")
        return int(fresh != text)
    readme.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
