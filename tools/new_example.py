"""``make new``: the beginnings of an example, from the smallest one.

python tools/new_example.py mnist_jax
"""

import argparse
import keyword
import re
import sys
from pathlib import Path

from copy_out import ROOT, class_name, sections

SOURCE = "mnist_torch_vanilla"
FILES = ("README.md", "example.toml", "requirements.txt", "flow.py", "train.py")

NEXT = """\
{name}/ is a training like {source}, under another name, and it runs: python {name}/flow.py run

Next (CONTRIBUTING.md says more):
  1. train.py: your framework, first alone: python {name}/train.py. The configuration refuses bad values.
  2. flow.py: parameters, and what the last step shows.
  3. example.toml: title, level, frameworks, shows, and arguments of a tiny run.
  4. requirements.txt, in bounded ranges; then make constraints.
  5. README.md: what this one adds, and the real output of its commands.
  6. python tools/index.py, make lint, make test EX={name}
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Start a new example.")
    parser.add_argument("name", help="of the directory, such as mnist_jax")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    name, target = options.name, options.root / options.name
    if not re.fullmatch(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*", name) or keyword.iskeyword(name):
        return refuse(f"{name!r} cannot be an example: use lower-case words joined by '_' or '-'")
    if target.exists():
        return refuse(f"{target} exists: choose another name")
    words = re.sub(r"[_-]", " ", name)
    target.mkdir()
    for file in FILES:
        text = (ROOT / SOURCE / file).read_text(encoding="utf-8")
        if file == "README.md":
            text, _ = sections(text, lambda section: "](../tests/" in section)
            text = re.sub(r"^# .*", f"# {words.capitalize()}", text)
        text = re.sub(r'^title = ".*"', f'title = "{words.capitalize()}"', text, flags=re.MULTILINE)
        text = text.replace(SOURCE, name).replace("MnistTorchFlow", class_name(name))
        text = text.replace('label="mnist_torch"', f'label="{name.replace("-", "_")}"')
        (target / file).write_text(text, encoding="utf-8")
    print(NEXT.format(name=name, source=SOURCE), end="")
    return 0


def refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
