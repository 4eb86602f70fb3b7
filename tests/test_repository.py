"""What must hold of the repository itself."""

import ast
import re
import subprocess
import sys

import pytest
from gallery import REPO, Example

ADAPTERS = {"keras", "lightning", "transformers", "xgboost", "diffusers", "distributed", "foreign"}
# the street: a module may import those before it
ROOMS = [
    {"cores", "errors", "metaflow_card"},
    {"encoding", "events", "loopback_hub", "manifest", "policy", "process", "redact", "scratch", "stop", "writer"},
    {"data", "faults", "model_card", "report", "sampler", "snapshot", "state", "tensors", "tiny_models"},
    {"hub", "s3", "store"},
    {"metaflow_store"},
    {"torchrun"},
    {"checkpoint"},
    ADAPTERS,
    {"commands"},
    {"publish"},
    {"publisher"},
    {"__init__", "__main__"},
]


def relative_imports(source: str) -> set[str]:
    tree = ast.parse(source)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return {name for node in nodes for name in ([node.module] if node.module else [one.name for one in node.names])}


def test_common_is_a_one_way_street():
    place = {name: number for number, room in enumerate(ROOMS) for name in room}
    for path in sorted((REPO / "common").glob("*.py")):
        source = path.read_text()
        assert path.stem in place, f"common/{path.name} has no room: add it to ROOMS"
        assert not re.search(r"^\s*(from|import) common\b", source, re.MULTILINE), (
            f"{path.name}: imports must be relative"
        )
        for name in relative_imports(source):
            here, there = place[path.stem], place[name]
            assert there < here or (there == here and name not in ADAPTERS), f"{path.stem} must not import {name}"


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(REPO.glob("*/example.toml"))])
def test_each_step_that_works_is_retried(name):
    """A kill after the training ends no run. start only checks parameters and downloads, end only prints."""
    steps = {
        function.name: [ast.unparse(decorator) for decorator in function.decorator_list]
        for function in ast.walk(ast.parse((REPO / name / "flow.py").read_text()))
        if isinstance(function, ast.FunctionDef)
    }
    steps = {name: lines for name, lines in steps.items() if "step" in lines and name not in ("start", "end")}
    assert steps and not [name for name in steps if "retry(times=4, minutes_between_retries=0)" not in steps[name]]


def test_importing_common_needs_the_standard_library_only():
    """Metaflow imports it in bare remote interpreters."""
    code = (
        "import sys, common; third = [m for m in sys.modules if m.split('.')[0] in "
        "('numpy', 'torch', 'metaflow', 'xxhash', 'sklearn')]; print(third, common.METAFLOW_PACKAGE_POLICY)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] include"


def test_public_names_are_served():
    import common

    for name in common.__all__:
        assert getattr(common, name)
    with pytest.raises(AttributeError, match="nonsense"):
        common.nonsense  # noqa: B018


def test_the_index_in_the_readme_is_current():
    done = subprocess.run([sys.executable, str(REPO / "tools/index.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_example_is_complete(example: Example):
    toml = example.toml
    assert {"title", "level", "frameworks", "shows", "smoke", "minutes"} <= toml.keys()
    assert toml["level"] in ("starter", "intermediate", "advanced")
    for name in ("README.md", "flow.py", "requirements.txt"):
        assert (example.path / name).is_file(), name
    flow = (example.path / "flow.py").read_text()
    top = {node.module or "" for node in ast.parse(flow).body if isinstance(node, ast.ImportFrom)}
    top |= {name.name for node in ast.parse(flow).body if isinstance(node, ast.Import) for name in node.names}
    assert {name.split(".")[0] for name in top} <= {"metaflow", "common"}, "flow.py imports only these at its top"
    assert "import common" in flow
    for script in ("train.py", "generate.py"):
        if (example.path / script).exists():
            assert not re.search(r"^\s*(from|import) metaflow", (example.path / script).read_text(), re.MULTILINE)
    assert not (example.path / "__init__.py").exists()


def test_every_requirement_is_bounded_and_pinned():
    pinned = set(re.findall(r"^([a-z0-9._-]+)==", (REPO / "constraints.txt").read_text(), re.MULTILINE))
    for path in [*REPO.glob("*/requirements.txt"), REPO / "requirements-test.txt"]:
        if (path.parent / "constraints.txt").exists() and path.parent != REPO:
            continue  # an environment of its own
        for line in path.read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                name = re.split(r"[<>=!\[; ]", line)[0].lower().replace("_", "-")
                assert "<" in line, f"{path}: {line} has no upper bound"
                assert name in pinned, f"{path}: {name} is not in constraints.txt; run make constraints"


def test_no_machine_paths_and_no_secrets_in_the_sources():
    files = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        path = REPO / name
        if path.suffix in (".png", ".jpg", ".mp4") or name == "tests/test_repository.py" or not path.exists():
            continue
        text = path.read_text()
        assert not re.search(r"/(root|work|home)/\w+|/Users/\w+", text), f"{name} has a path of a machine"
        assert "BEGIN PRIVATE KEY" not in text


def test_every_link_leads_somewhere():
    """Within the repository, with the heading that it names."""
    pages = subprocess.run(["git", "ls-files", "*.md"], cwd=REPO, capture_output=True, text=True, check=True)
    for page in (REPO / name for name in pages.stdout.split()):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            path, _, heading = target.partition("#")
            file = (page.parent / path) if path else page
            assert file.exists(), f"{page.relative_to(REPO)}: {target} is missing"
            if heading:
                titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert heading in anchors, f"{page.relative_to(REPO)}: {target} names a heading that is not there"


def test_lint():
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_types():
    try:
        done = subprocess.run(["pyright"], cwd=REPO, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        pytest.skip("pyright is not installed")
    report = done.stdout + done.stderr
    if done.returncode and not re.search(r"[0-9]+ errors?,", report):
        pytest.skip(f"pyright could not start (it needs Node.js): {report[-300:]}")
    assert done.returncode == 0, report[-3000:]


@pytest.mark.xdist_group("together")
def test_marked_tests_stay_together(request):
    """A version of pytest-xdist that groups nothing makes every shared run twice, silently."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("needs -n and --dist loadgroup, as in make test")
    assert request.node.nodeid.endswith("@together")
