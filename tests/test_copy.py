"""``make copy`` and ``make new``: a copy is a project of its own, that tests itself, with or without the gallery."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import pytest.__main__ as pytest_main
from gallery import REPO, Example, discover
from preforked import python_of

QUICK = ("mnist_torch_vanilla", "xgboost", "mnist_ptl")  # examples that start quickly: their copies are always tested


def copy_out(*arguments) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(REPO / "tools/copy_out.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=900)


@pytest.fixture
def hostile(tmp_path) -> dict[str, str]:
    """An environment in which importing the gallery's package is an error."""
    package = tmp_path / "hostile" / "common"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('a copy must not need the gallery')")
    return {**os.environ, "PYTHONPATH": str(package.parent), "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path)}


def test_a_copy_tests_itself(example: Example, tmp_path, hostile, pytestconfig):
    """Its own test kills and resumes it, in this environment, where the gallery is installed but out of reach."""
    if example.name not in QUICK and not pytestconfig.getoption("--all"):
        pytest.skip("a copy of every example: run with --all")
    project = tmp_path / "my_project"
    done = copy_out(example.name, project)
    assert done.returncode == 0, done.stderr
    line = [python_of(project / "flow.py", hostile), pytest_main.__file__, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(line, cwd=project, env=hostile, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "1 passed" in done.stdout


def test_it_is_packaged_for_remote_tasks(tmp_path, hostile):
    """With the gallery installed, too: Metaflow refuses two packages of one name."""
    copy_out("mnist_torch_vanilla", tmp_path / "42", "--name", "my digits")
    line = [sys.executable, str(tmp_path / "42/flow.py"), "package", "list"]
    for env in (hostile, {**hostile, "PYTHONPATH": ""}):
        done = subprocess.run(line, env=env, cwd=tmp_path / "42", capture_output=True, text=True, timeout=900)
        listed = done.stdout + done.stderr
        assert done.returncode == 0 and "executing MyDigitsFlow" in listed, listed
        assert "my_digits/checkpoint.py" in listed and "train.py" in listed, listed
        assert not re.search(r"\bcommon/", listed), "the gallery's package is packaged"


@pytest.mark.parametrize("one", [pytest.param(example, id=example.name) for example in discover()])
def test_a_copy_has_what_it_needs_and_nothing_else(one: Example, tmp_path):
    project = tmp_path / "my_project"
    done = copy_out(one.name, project)
    assert done.returncode == 0, done.stderr
    files = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    assert files >= {"flow.py", "requirements.txt", "README.md", "test_resume.py", ".gitignore"}
    assert not {"my_project/__main__.py", "example.toml", "plain_flow.py"} & files
    assert ("my_project/commands.py" in files) == ("my_project/publish.py" in files)
    sources = {name: (project / name).read_text() for name in files if name.endswith(".py")}
    package = {name.split("/")[1][:-3] for name in sources if "/" in name}
    required = installed_by((project / "requirements.txt").read_text()) | {"pytest"}
    used: set[str] = set()
    for name, source in sources.items():
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                used |= {node.module} if node.module else {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("my_project."):
                used.add(node.module.split(".")[1])
            assert not (isinstance(node, ast.Name) and node.id == "common"), name
        # what is imported when the module is: the rest may depend on what is installed
        roots = {
            (node.module or "").split(".")[0]
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and not node.level
        }
        roots |= {
            alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names
        }
        for root in roots - sys.stdlib_module_names - {"my_project", *(Path(file).stem for file in sources)}:
            owners = {normal(owner) for owner in packages_distributions().get(root, [root])}
            assert owners & required, f"{name} imports {root}, which requirements.txt does not bring"
    assert used <= package, "the copy lacks a module of its own package"
    loaded = "import my_project as p; [getattr(p, n) for n in p.__all__]; p.report; print(p.COPIED_FROM)"
    if one.name == "mnist_torch_vanilla":
        done = subprocess.run([sys.executable, "-c", loaded], cwd=project, capture_output=True, text=True, timeout=900)
        assert re.match(r"Metaflow checkpoint gallery [0-9.]+", done.stdout), done.stderr[-2000:]
    readme = (project / "README.md").read_text()
    assert "](../" not in readme and "python -m common" not in readme and f"{one.name}/" not in readme
    for target in re.findall(r"\]\(([^)#:\s]+)\)", readme):
        assert (project / target).exists(), f"README.md links to {target}"
    for command in re.findall(r"python ([\w/]+\.py)", readme):
        assert (project / command).exists(), f"README.md runs {command}"
    for source in [readme, *sources.values()]:
        assert not re.search(r"\bcommon[./][a-z_]+\b", source), "the gallery's package is mentioned"
        assert not re.search(r"\bmake [a-z]+ EX=", source), "a command of the gallery is mentioned"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_by(requirements: str) -> set[str]:
    """The distributions that these requirements bring, with theirs."""
    queue = [re.split(r"[\s<>=!~\[;(]", line)[0] for line in requirements.splitlines() if line and line[0] not in "#-"]
    found: set[str] = set()
    while queue:
        name = normal(queue.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needed = requires(name) or []
        except Exception:  # not installed here
            continue
        queue += [re.split(r"[\s<>=!~\[;(]", line)[0] for line in needed if "extra ==" not in line]
    return found


def test_refusals(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    (full / "gallery").symlink_to(REPO)
    for arguments, message in [
        (["mnist_torch_vanilla", full], "is not empty"),
        (["mnist_torch_vanilla", full / "mine.txt"], "is not empty"),
        (["mnist_torch_vanilla", REPO / "copy"], "is inside of the gallery"),
        (["mnist_torch_vanilla", full / "gallery/copy"], "is inside of the gallery"),
        (["nothing", tmp_path / "my_project"], "there is no example 'nothing'; there are: "),
        (["mnist_torch_vanilla", tmp_path / "torch"], "the package cannot be called torch"),
        (["mnist_torch_vanilla", tmp_path / "my_project", "--name", "common"], "cannot be called common"),
        (["mnist_torch_vanilla", tmp_path / "my_project", "--name", "train"], "cannot be called train"),
        (["mnist_torch_vanilla", tmp_path / "my_project", "--name", "json"], "cannot be called json"),
        (["mnist_torch_vanilla", tmp_path / "2026"], "cannot be the name of a package"),
    ]:
        done = copy_out(*arguments)
        assert done.returncode == 2 and message in done.stderr, (arguments, done.stderr)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [full] and len(list(full.iterdir())) == 2 and not (REPO / "copy").exists()


def test_new(tmp_path):
    """It runs from the start, and nothing in it has the name of the one it was made from."""

    def new(name):
        line = [sys.executable, str(REPO / "tools/new_example.py"), name, "--root", str(tmp_path)]
        return subprocess.run(line, capture_output=True, text=True, timeout=900)

    done = new("digits_jax")
    assert done.returncode == 0 and "make test EX=digits_jax" in done.stdout, done.stderr
    example = Example(tmp_path / "digits_jax")
    assert tomllib.loads((example.path / "example.toml").read_text())["title"] == "Digits jax"
    assert example.flow_name == "DigitsJaxFlow"
    assert example.readme_commands[0] == "python digits_jax/flow.py run"
    for path in example.path.iterdir():
        assert not re.search("mnist_torch|MnistTorch|plain_flow", path.read_text()), path.name
    shown = subprocess.run(
        [sys.executable, str(example.path / "flow.py"), "show"], cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.returncode == 0 and "evaluate" in shown.stdout + shown.stderr
    for name, message in (("digits_jax", "exists"), ("../x", "lower-case words"), ("class", "lower-case words")):
        done = new(name)
        assert done.returncode == 2 and message in done.stderr
