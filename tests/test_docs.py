"""The tutorials: each of their files is written, each command is run, and what it prints is what they say."""

import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gallery import REPO
from preforked import Preforked

TUTORIALS = sorted((REPO / "docs").glob("[0-9]*.md"))
IMPORTS = ["numpy", "torch", "torch.utils.data", "safetensors.torch", "safetensors.numpy", "huggingface_hub",
           "common.checkpoint", "common.sampler", "common.state", "metaflow"]  # fmt: skip
NUMBER, ID = r"\d+\.\d+", r"\b[0-9a-f]{16,64}\b"  # of a run, or a hash


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Kind, name of the file, and text of each fenced block, in order."""
    return re.findall(r"^```(\w*) ?(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def changed(text: str, diff: str) -> str:
    """``text`` with the parts of a diff applied, which are separated by lines with ``@@``."""
    for part in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = [line if line.strip() else " \n" for line in part.splitlines(keepends=True)]  # an empty one is kept
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        assert before != after and text.count(before) == 1, f"it does not fit exactly once:\n{part}"
        text = text.replace(before, after)
    return text


def tokens(line: str) -> list[str]:
    """What is compared: without Metaflow's prefix, times, and which checkpoints a kill has left."""
    line = re.sub(r"^[-\d]+ [:.\d]+ (?:\[\d+/(\w+)/\d+ \(pid \d+\)\] )?", r"\1 | ", line)
    line = re.sub(r"found [1-9]\d* checkpoints?", "found some", line)
    line = re.sub(r"(resumed|kill@save=\S+) at step \d+(, \d+)*( \(epoch \d+\))?", r"\1", line)
    line = re.sub(r"/\d+ attempt \d+ step-\d+", "/some task", line)  # which of them got that far
    line = re.sub(r"a newest checkpoint of step \d+|done after \d+ runs", "some checkpoint, some runs", line)
    line = re.sub(r"127\.0\.0\.1:\d+", "here", line)
    line = re.sub(r"\b\d+(\.\d+)? (ms|s|min|h)\b", "some time", line)
    return [atom for atom in re.split(rf"\s+|({NUMBER}|{ID})", line) if atom]


class Said:
    """Compares what a tutorial says with what is printed. Ids and hashes differ, but the same one stays the same."""

    def __init__(self) -> None:
        self.printed: dict[str, str] = {}  # by what the tutorial says

    def is_same(self, said: str, printed: str) -> bool:
        if re.fullmatch(ID, said) and re.fullmatch(ID, printed):
            is_new = said not in self.printed and printed not in self.printed.values()
            return is_new or self.printed.get(said) == printed
        if re.fullmatch(NUMBER, said) and re.fullmatch(NUMBER, printed):
            return math.isclose(float(said), float(printed), rel_tol=0.1)  # another processor rounds in another way
        return said == printed

    def check(self, said: str, printed: str) -> None:
        """Each line that is said is printed, in this order; ``...`` stands for any number of lines."""
        left = [tokens(line) for line in printed.splitlines()]
        for line in said.splitlines():
            wanted = tokens(line)
            if wanted in ([], ["..."]):
                continue
            while left and not (len(left[0]) == len(wanted) and all(map(self.is_same, wanted, left[0]))):
                left.pop(0)
            assert left, f"this line is not printed, or not after the one before it:\n{line}\n--- printed:\n{printed}"
            self.printed.update((a, b) for a, b in zip(wanted, left.pop(0), strict=True) if re.fullmatch(ID, a))

    def command(self, said: str) -> str:
        """With this run's ids in place of the tutorial's."""
        for name, value in self.printed.items():
            said = said.replace(name, value)
        return said


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_every_block_of_a_tutorial_runs(tutorial: Path, tmp_path: Path) -> None:
    python, said = Preforked("python", "preforked:script", IMPORTS), Said()
    env = {**os.environ, "PATH": f"{python.directory}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
    try:
        for kind, name, text in blocks(tutorial.read_text()):
            if kind == "console":
                for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
                    run(said, command, output, tmp_path, env)
            elif kind == "diff":
                (tmp_path / name).write_text(changed((tmp_path / name).read_text(), text))
            else:
                assert kind in ("python", "json", "yaml") and name, f"no test for a block of {kind!r} named {name!r}"
                (tmp_path / name).write_text(text)
    finally:
        python.close()


def run(said: Said, command: str, output: str, cwd: Path, env: dict[str, str]) -> None:
    """A command whose comment is ``# fails`` fails, and no other."""
    done: Any = subprocess.run(
        ["bash", "-c", said.command(command)], cwd=cwd, env=env, timeout=900, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    fails = command.endswith("# fails")
    assert bool(done.returncode) == fails, f"{command}: exit status {done.returncode}\n{done.stdout[-6000:]}"
    said.check(output, done.stdout)


# -------------------------------------------------------------------- the comparison itself


@pytest.mark.parametrize(
    ("said", "printed"),
    [
        ("loss 0.51", "loss 0.62"),
        ("one\ntwo", "two\none"),
        ("weights 1234567890abcdef\nweights 1234567890abcdef", "weights 1111111111111111\nweights 2222222222222222"),
        ("weights 1234567890abcdef\nweights aaaaaaaaaaaaaaaa", "weights 1111111111111111\nweights 1111111111111111"),
        ("step 12", "step 13"),
        ("[checkpoints] starts at step 0", "[checkpoints] found 2 checkpoints; resumed at step 30 (epoch 1)"),
    ],
)
def test_a_difference_is_noticed(said: str, printed: str) -> None:
    with pytest.raises(AssertionError, match="is not printed"):
        Said().check(said, printed)


def test_what_may_differ_does() -> None:
    said = Said()
    said.check(
        "a | found 2 checkpoints; resumed at step 30 (epoch 1)\n...\na | loss 0.5083 3 s\nrun-id 1795922711960393",
        "2026-11-29 03:25:24.918 [1790000000000000/a/1 (pid 13285)] found 1 checkpoint; resumed at step 20 (epoch 0)\n"
        "something\n2026-11-29 03:25:24.918 [1790000000000000/a/1 (pid 1)] loss 0.5084 71 s\nrun-id 1790000000000000",
    )
    assert said.command("list F/1795922711960393@30") == "list F/1790000000000000@30"


def test_a_diff_that_does_not_fit_is_an_error() -> None:
    assert changed("a\nb\nc\n", " a\n-b\n+d\n@@\n c\n+e\n") == "a\nd\nc\ne\n"
    for diff in (" a\n-x\n+y\n", " a\n"):
        with pytest.raises(AssertionError, match="exactly once"):
            changed("a\nb\n", diff)
