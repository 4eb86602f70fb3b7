"""Flows that download with @huggingface_hub. test_hub.py sends them to a loopback hub and counts its requests."""

import json
import os
from pathlib import Path

from metaflow import FlowSpec, Parameter, current, huggingface_hub, model, retry, step

import common
from common import tiny_models

REPO = "org/model"
JSON, ALL = ["*.json"], ["*.json", "*.safetensors"]
tiny_models.BUILDERS["local/notes"] = lambda directory: (directory / "notes.txt").write_text("built")
PINNED = {"repo_id": REPO, "revision": os.environ["HUB_COMMIT"], "allow_patterns": ALL}


def contents(path) -> dict:
    """The files of a loaded repository, through symlinks: name -> the version that its JSON names, or its size."""
    found = {}
    for folder, _, names in os.walk(path, followlinks=True):
        for file in (Path(folder, name) for name in names):
            if ".cache" not in file.parts:
                value = json.loads(file.read_text())["version"] if file.suffix == ".json" else file.stat().st_size
                found[file.relative_to(path).as_posix()] = value
    return found


class HubFlow(FlowSpec):
    revision = Parameter("revision", default="main")
    local = Parameter("local", default=False)

    @huggingface_hub(cache_scope="flow")
    @step
    def start(self):
        hub = current.huggingface_hub
        self.commit = common.hub.resolve(REPO, self.revision)
        older = os.environ["HUB_OLDER_COMMIT"]
        with common.hub.clear_errors(REPO, self.commit):
            self.older = hub.snapshot_download(repo_id=REPO, revision=older, allow_patterns=JSON)
            self.base_model = hub.snapshot_download(repo_id=REPO, revision=self.commit, allow_patterns=ALL)
        self.checks = {}
        with hub.load(repo_id=REPO, revision=older, allow_patterns=JSON) as path:
            self.checks["older"] = contents(path)
        ignoring = hub.snapshot_download(repo_id=REPO, revision=older, ignore_patterns=JSON)
        self.checks["allow is ignore"] = ignoring["key"] == self.older["key"]
        if self.local:
            name = "local/notes"
            commit = common.hub.resolve(name)
            notes = hub.snapshot_download(repo_id=name, revision=commit, endpoint=common.hub.endpoint(name))
            self.checks["local"] = Path(notes["url"], "notes.txt").read_text()
        self.indices = [0, 1]
        self.next(self.work, foreach="indices")

    @model(load=["base_model"])
    @step
    def work(self):
        loaded = Path(current.model.loaded["base_model"])
        common.hub.verify(loaded, self.commit)
        copy = common.hub.private_copy(loaded, self.commit)
        (copy / "config.json").write_text("{}")  # must not reach the cache: the next run verifies it
        self.files = contents(loaded)
        self.links = [path.name for path in loaded.iterdir() if path.is_symlink()]
        self.copied = sorted(path.name for path in copy.iterdir())
        self.copied_links = [path.name for path in copy.rglob("*") if path.is_symlink()]
        self.next(self.join)

    @step
    def join(self, inputs):
        self.merge_artifacts(inputs, include=["checks", "commit"])
        self.workers = [(worker.files, worker.links, worker.copied, worker.copied_links) for worker in inputs]
        self.next(self.end)

    @huggingface_hub(cache_scope="flow", load=[PINNED])
    @step
    def end(self):
        path = current.huggingface_hub.loaded[REPO]
        self.checks["verified"] = common.hub.verify(path, self.commit)
        self.checks["loaded"] = contents(path)
        self.checks["links"] = any(file.is_symlink() for file in Path(path).iterdir())


class BrokenFlow(FlowSpec):
    """The connection breaks in the middle of a file."""

    @retry(times=1, minutes_between_retries=0)
    @huggingface_hub(cache_scope="flow")
    @step
    def start(self):
        with common.hub.clear_errors(REPO, PINNED["revision"]):
            base = current.huggingface_hub.snapshot_download(**PINNED)
        self.attempt = current.retry_count
        with current.huggingface_hub.load(**PINNED) as path:
            self.files = contents(path)
            self.verified = common.hub.verify(path, PINNED["revision"])
        self.entries = len(list(Path(base["url"]).parent.iterdir()))
        self.next(self.careless)

    @huggingface_hub
    @step
    def careless(self):
        """What goes wrong with the default scope (H11), with a passed token and after an error that was caught."""
        hub = current.huggingface_hub
        older, newer = os.environ["HUB_OLDER_COMMIT"], PINNED["revision"]
        for revision, patterns in ((older, JSON), (newer, ALL)):
            with hub.load(repo_id=REPO, revision=revision, allow_patterns=patterns) as path:
                self.default_scope = contents(path)
                self.default_scope_refused = refusal(path, revision)
        with hub.load(repo_id="org/other", revision="v1", token="hf_secret"):
            records = hub._checkpointer.list(full_namespace=True)
            self.token_stored = any("hf_secret" in json.dumps(record) for record in records)
        try:
            hub.snapshot_download(repo_id="org/breaks")
        except Exception as error:
            self.broken = str(error)
        third = os.environ["HUB_THIRD_COMMIT"]
        hub.snapshot_download(repo_id="org/third", revision=third)
        with hub.load(repo_id="org/third", revision=third) as path:
            self.leftovers = contents(path)
            self.leftovers_refused = refusal(path, third)
        self.next(self.end)

    @step
    def end(self):
        pass


def refusal(path, commit) -> str:
    try:
        common.hub.verify(path, commit)
    except common.hub.HubError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    BrokenFlow() if os.environ.get("HUB_FLOW") == "broken" else HubFlow()
