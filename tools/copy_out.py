"""``make copy``: an example as a project of its own, with what it needs of common/ and nothing else.

python tools/copy_out.py mnist_torch_vanilla ~/digits
python tools/copy_out.py mnist_torch_vanilla ~/digits --name digits     # names the package and the flow, too
"""

import argparse
import ast
import importlib.util
import json
import keyword
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMON = ROOT / "common"
LEFT_OUT = re.compile(r"(test_.*|.*_test|conftest)\.py|example\.toml|README\.md")

GITIGNORE = ".venv/\n__pycache__/\n.pytest_cache/\n.metaflow/\ncheckpoints/\ndata/\n"

SETUP = """\
## Set it up

```
python -m venv .venv && . .venv/bin/activate
pip install -r requirements.txt{constraints} pytest
pytest                     # kills the flow, and compares what comes back with an uninterrupted run
```

`{package}/` is the checkpoint layer. All of this was copied from the
{origin}.

"""

TEST = '''\
"""Kills this project's flow in the middle and compares what comes back with an uninterrupted run."""

import json
import os
import subprocess
import sys
from pathlib import Path

FLOW = Path(__file__).resolve().parent / "flow.py"
ARGUMENTS = {arguments}  # of a tiny run, of ten steps or more, with several checkpoints

READ = """
import json, sys
from metaflow import Run, namespace
namespace(None)
data = Run(sys.argv[1])["end"].task.data
digest = data.weights_digest if "weights_digest" in data else data.outputs_digest
print(json.dumps({{"digest": digest, "history": data.history, "resumed_from": data.resumed_from}}))
"""


def run_flow(directory, faults):
    """Run the flow in a datastore of its own; return what its last step holds."""
    directory.mkdir()
    environment = {{
        **os.environ,
        "FAULTS": faults,
        "METAFLOW_HOME": str(directory / "home"),
        "METAFLOW_USER": "tester",
        "METAFLOW_DEFAULT_DATASTORE": "local",
        "METAFLOW_DEFAULT_METADATA": "local",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(directory),
        "METAFLOW_CARD_LOCALROOT": str(directory / "cards"),
    }}

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], cwd=directory, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    run(str(FLOW), "run", "--run-id-file", "run_id", *ARGUMENTS)
    run_id = (directory / "run_id").read_text().strip()
    return json.loads(run("-c", READ, f"{flow}/{{run_id}}"))


def test_killed_and_resumed(tmp_path):
    straight = run_flow(tmp_path / "straight", "")
    assert straight["resumed_from"] == []
    last = straight["history"][-1]["step"]
    middle = last * 2 // 3
    killed = run_flow(tmp_path / "killed", f"kill@step={{middle}}")
    assert len(killed["resumed_from"]) == 1, (
        f"it did not resume: killed after step {{middle}} of {{last}} it had no checkpoint; change ARGUMENTS so that "
        "there are more steps, or checkpoints more often"
    )
    assert killed["history"] == straight["history"]
    assert killed["digest"] == straight["digest"], "it is not what the uninterrupted run gives, bit for bit"
'''


class Refused(Exception):
    """The copy cannot be made; the message says why and what to do."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Copy an example out of the gallery.")
    parser.add_argument("example", help="a directory with an example.toml")
    parser.add_argument("destination", help="a directory that is empty or does not exist")
    parser.add_argument("--name", help="of the package and the flow; by default the package has the directory's name")
    options = parser.parse_args(arguments)
    try:
        destination = Path(options.destination).expanduser().resolve()
        check_destination(destination)
        files = project(options.example, package_name(options.name or destination.name, options.example), options.name)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, content in files.items():
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    print(f"{destination} is a project of its own now: {', '.join(name for name in files if '/' not in name)}")
    print(f"Next: cd {shlex.quote(str(destination))}, then what README.md says under 'Set it up'.")
    return 0


def check_destination(destination: Path) -> None:
    """Raise Refused for a place where a copy would do harm."""
    if destination.is_relative_to(ROOT):
        raise Refused(f"{destination} is inside of the gallery: copy to a place outside of it")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise Refused(f"{destination} is not empty: copy to a new directory")


def package_name(name: str, example: str) -> str:
    """``name`` as the name of a package that nothing else in the project has. Raises Refused."""
    package = re.sub(r"\W+", "_", name).strip("_").lower()
    advice = "choose another name for the project with --name (make copy NAME=...)"
    if not package.isidentifier() or keyword.iskeyword(package):
        raise Refused(f"{name!r} cannot be the name of a package: {advice}")
    taken = {"common", "metaflow_extensions", "tests", *sys.stdlib_module_names}
    for path in (ROOT / example).glob("*.py"):
        taken |= {path.stem, *imported(path.read_text(encoding="utf-8"))}
    if package in taken or importlib.util.find_spec(package) is not None:
        raise Refused(f"the package cannot be called {package}, because something that can be imported is: {advice}")
    return package


def imported(source: str) -> set[str]:
    """The top-level names of everything that a module imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def project(example: str, package: str, name: str | None) -> dict[str, bytes]:
    """All files of the copy by their names. Raises Refused for an example that does not exist."""
    source = ROOT / example
    if not (source / "example.toml").is_file():
        there = ", ".join(sorted(path.parent.name for path in ROOT.glob("*/example.toml")))
        raise Refused(f"there is no example {example!r}; there are: {there}")
    readme, dropped = sections(
        (source / "README.md").read_text(encoding="utf-8"), lambda section: "](../tests/" in section
    )
    found = [
        path
        for path in sorted(source.rglob("*"))
        if path.is_file()
        and not re.search(r"(^|/)(__pycache__|checkpoints|data|\..*)/|^\.", str(path.relative_to(source)))
        and not LEFT_OUT.fullmatch(path.name)
        # what only a section about the gallery's own tests speaks of
        and not (path.name in dropped and path.name not in readme)
    ]
    code = {str(path.relative_to(source)): path.read_text(encoding="utf-8") for path in found if path.suffix == ".py"}
    modules = needed(list(code.values()))
    flow = re.search(r"^class (\w+)\(FlowSpec\)", code["flow.py"], re.MULTILINE)[1]
    new_flow = class_name(name) if name else flow
    own = {"example": example, "package": package, "flow": flow, "new_flow": new_flow}

    files: dict[str, bytes] = {}
    for path in found:
        target = str(path.relative_to(source))
        files[target] = renamed(code[target], **own).encode() if target in code else path.read_bytes()
    for module in sorted(modules):
        text = (COMMON / f"{module}.py").read_text(encoding="utf-8")
        if module == "__init__":
            text = trimmed_init(text, modules)
        files[f"{package}/{module}.py"] = renamed(text, **own).encode()
    toml = tomllib.loads((source / "example.toml").read_text())
    files["test_resume.py"] = TEST.format(arguments=json.dumps(shlex.split(toml["smoke"])), flow=new_flow).encode()
    files["README.md"] = own_readme(readme, modules, constraints="constraints.txt" in files, **own).encode()
    files[".gitignore"] = GITIGNORE.encode()
    return files


# -------------------------------------------------------------------- modules


def needed(sources: list[str]) -> set[str]:
    """The modules of common/ that these sources import, and those that these import, and so on."""
    served = served_names()
    wanted = {"__init__"}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module == "common":
                wanted |= {served.get(alias.name, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common."):
                wanted.add(node.module.split(".")[1])
            elif isinstance(node, ast.Import):
                wanted |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("common.")}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "common":
                wanted.add(served.get(node.attr, node.attr))  # common/__init__.py serves it on first use
    queue, found = list(wanted), {"__init__"}
    while queue:
        module = queue.pop()
        if module in found:
            continue
        path = COMMON / f"{module}.py"
        if not path.is_file():
            raise Refused(f"the example uses common.{module}, which does not exist")
        found.add(module)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                queue += [node.module] if node.module else [alias.name for alias in node.names]
    return found


def served_names() -> dict[str, str]:
    """Which module each name of ``common`` lives in."""
    values = assigned((COMMON / "__init__.py").read_text(encoding="utf-8"))
    return {**ast.literal_eval(values["_HOME"]), **{name: name for name in ast.literal_eval(values["_ROOMS"])}}


def assigned(source: str) -> dict[str, ast.expr]:
    """The values of a module's assignments to plain names."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: node.value for node in nodes if isinstance(node.targets[0], ast.Name)}


def trimmed_init(source: str, modules: set[str]) -> str:
    """common/__init__.py without the names of modules that are not in the copy, and with the mark of its origin."""
    served, values = served_names(), assigned(source)
    drop: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            if not modules.intersection(names):
                drop |= set(range(node.lineno, node.end_lineno + 1))
    for item in [*values["_HOME"].keys, *values["__all__"].elts]:
        if served[item.value] not in modules:
            drop.add(item.lineno)
    lines = [line for number, line in enumerate(source.splitlines(), 1) if number not in drop]
    text = "\n".join(lines) + "\n"
    rooms = tuple(room for room in ast.literal_eval(values["_ROOMS"]) if room in modules)
    text = re.sub(r"^_ROOMS = \([^)]*\)", "_ROOMS = " + repr(rooms).replace("'", '"'), text, flags=re.MULTILINE)
    text = text.replace("under every example of this gallery", "of this project")
    return text.replace("from importlib import", f'COPIED_FROM = "{origin()}"\n\nfrom importlib import', 1)


def origin() -> str:
    """The version of the gallery and its commit."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"Metaflow checkpoint gallery {version}"
    more = " with changes" if changes.stdout else ""
    return f"Metaflow checkpoint gallery {version}, commit {commit.stdout.strip()}{more}"


# -------------------------------------------------------------------- names and words


def class_name(name: str) -> str:
    """``my_project`` as ``MyProjectFlow``."""
    name = "".join(word[:1].upper() + word[1:] for word in re.split(r"\W+|_", name) if word)
    return name if name.endswith("Flow") else f"{name}Flow"


def renamed(source: str, *, example: str, package: str, flow: str, new_flow: str) -> str:
    """A module of the copy: the package and the flow have the project's names, the files no directory."""
    text = re.sub(r"^(\s*)(import|from) common\b", rf"\1\2 {package}", source, flags=re.MULTILINE)
    text = re.sub(r"(?<![\w./])common(?=[./]\w)", package, text)
    text = re.sub(rf"\b{flow}\b", new_flow, text)
    return re.sub(rf"(?<![\w./-]){re.escape(example)}/", "", text)


def sections(text: str, about_the_gallery) -> tuple[str, str]:
    """A README without some of its sections, and those."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    kept = [part for part in parts if not about_the_gallery(part)]
    return "".join(kept), "".join(part for part in parts if about_the_gallery(part))


def own_readme(
    text: str, modules: set[str], *, constraints: bool, example: str, package: str, flow: str, new_flow: str
) -> str:
    """The README of the copy: nothing in it leads out, and commands have no directory."""
    parts = re.split(r"(^```.*?^```\n)", text, flags=re.MULTILINE | re.DOTALL)
    for number, part in enumerate(parts):
        if part.startswith("```"):
            lines = part.splitlines(keepends=True)
            parts[number] = "".join(line for line in lines if not re.search(r"python -m common|^make ", line))
        else:
            parts[number] = without_sentences(part, rf"Copy `{example}/`|python -m common|make example|The test suite")
    text = "".join(parts).replace("The repository's [README](../README.md)", "The gallery's README")
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)}

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        module = re.fullmatch(r"\.\./common/(\w+)\.py", target)
        if module and module[1] in modules:
            return f"[{words}]({package}/{module[1]}.py)"
        if target.startswith("../") or (target.startswith("#") and target[1:] not in anchors):
            return words
        return match[0]

    text = re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)
    text = text.replace("`common/`", f"`{package}/`")
    text = renamed(text, example=example, package=package, flow=flow, new_flow=new_flow)
    head, mark, rest = text.partition("\n## ")
    setup = SETUP.format(package=package, origin=origin(), constraints=" -c constraints.txt" if constraints else "")
    return f"{head}\n{setup}{mark.lstrip()}{rest}"


def without_sentences(text: str, pattern: str) -> str:
    """Prose without the sentences that match; paragraphs that change are filled anew."""
    paragraphs = text.split("\n\n")
    for number, paragraph in enumerate(paragraphs):
        if re.search(pattern, paragraph):
            joined = re.sub(r"\s*\n\s*", " ", paragraph.strip("\n"))
            kept = [part for part in re.split(r"(?<=[.:!?])\s+(?=[A-Z`\[])", joined) if not re.search(pattern, part)]
            if kept and kept[-1].endswith("there is"):
                kept.pop()
            text = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), " ".join(kept))
            filled = textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False).replace("\0", " ")
            before, after = re.match(r"\n*", paragraph)[0], re.search(r"\n*$", paragraph)[0]
            paragraphs[number] = f"{before}{filled}{after}"
    return "\n\n".join(
        part for number, part in enumerate(paragraphs) if part.strip() or number in (0, len(paragraphs) - 1)
    )


if __name__ == "__main__":
    sys.exit(main())
