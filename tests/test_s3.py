"""S3 through one client: the same objects, few requests, clear errors. The server is moto, on loopback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy
from gallery import REPO

from common import s3
from common.errors import CheckpointError, InvalidCheckpoint, WriteFailed
from common.manifest import Manifest, hash_file
from common.metaflow_store import MetaflowStore, Reader

moto = pytest.importorskip("moto.moto_server.werkzeug_app", reason="moto is not installed")
pytestmark = pytest.mark.xdist_group("s3")

ROOT = "s3://bucket/some/root"
METADATA = "mf.checkpoints/checkpoints/metadata"


class Server:
    """Records requests, and refuses those for which ``refuse`` gives a status and an error code."""

    def __init__(self):
        from werkzeug.serving import make_server

        self.requests = []
        self.refuse = lambda method, path: None
        self._app = moto.DomainDispatcherApplication(moto.create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, True, request_handler=moto.MotoRequestHandler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if not (refused := self.refuse(method, path)):
            return self._app(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, code = refused
        start_response(f"{status} Refused", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>of the test</Message></Error>".encode()]

    def count(self, function):
        """The requests that a call makes."""
        del self.requests[:]
        function()
        return list(self.requests)

    def close(self):
        self._server.shutdown()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def client(server, monkeypatch, tmp_path):
    """The server as the place of checkpoints, and a client of its own to look at it."""
    import boto3
    from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.datastore.context import datastore_context

    for name, value in {
        "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "METAFLOW_CHECKPOINT_ARTIFACT_STORE_CONFIG": json.dumps({"type": "s3", "config": {"root": ROOT}}),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("metaflow.metaflow_config.DEFAULT_DATASTORE", "s3")  # of the command line
    # Metaflow keeps the first retry configuration that it meets
    monkeypatch.setattr("metaflow.plugins.datatools.s3.s3util.DATATOOLS_CLIENT_PARAMS", {})
    monkeypatch.chdir(tmp_path)  # where Metaflow's own client puts its temporary files
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    datastore_context.switch_context({"type": "s3", "config": {"root": ROOT}})
    yield client
    server.refuse = lambda method, path: None
    datastore_context.switch_context(None)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
        for item in page.get("Contents", []):
            client.delete_object(Bucket="bucket", Key=item["Key"])


@pytest.fixture
def enter(client, monkeypatch):
    """Makes this process an attempt of a task; returns its store."""

    def enter(attempt=0, run="1"):
        monkeypatch.setenv("METAFLOW_CHECKPOINT_UID", f"Cloud/{run}/train/7/identifier/scope/{attempt}")
        return MetaflowStore()

    return enter


def stage(directory: Path, step: int, size: int = 1000) -> Manifest:
    (directory / "state.safetensors").write_bytes(os.urandom(size))
    (directory / "state.json").write_text(json.dumps({"step": step}))
    files = {path.name: hash_file(path) for path in directory.iterdir()}
    manifest = Manifest(step, None, step, {}, {}, {}, files)
    manifest.write(directory)
    return manifest


def save(store: MetaflowStore, step: int, size: int = 1000):
    staged = store.stage()
    entry = store.commit(staged, stage(staged, step, size))
    store.events.add("saved", step=step)
    return entry


def objects(client, prefix=""):
    """Everything that is stored, with what a reader can see of it."""
    found = {}
    for item in client.list_objects_v2(Bucket="bucket", Prefix=f"some/root/{prefix}").get("Contents", []):
        given = client.get_object(Bucket="bucket", Key=item["Key"])
        found[item["Key"].removeprefix("some/root/")] = (
            given["ContentType"], given["Metadata"], given.get("ServerSideEncryption"), given["Body"].read()
        )  # fmt: skip
    return found


def test_contract_with_the_library(enter):
    """The parts of Metaflow that s3.py stands on."""
    store = enter()
    private = store._library.private
    assert isinstance(store._library.backend, s3.S3Backend), "metaflow-checkpoint has moved: see common/s3.py"
    for part in (private.artifact_store, private.metadata_store, private.artifact_metadatastore):
        assert part._backend is store._library.backend
    assert isinstance(Reader().backend, s3.S3Backend)


def test_the_objects_are_those_of_the_library(enter, client, tmp_path):
    import metaflow

    store = enter()
    staged = store.stage()
    manifest = stage(staged, 1)
    copied = Path(shutil.copytree(staged, tmp_path / "copied"))
    entry = store.commit(staged, manifest)
    ours = objects(client)
    plain = metaflow.Checkpoint().save(str(copied), name="plain", metadata=entry.reference["metadata"])

    def alike(objects, reference):
        """By the end of the key: what kind of object it is, and its content but for what is its own."""
        own, found = f"{reference['name']}.{reference['version_id']}", {}
        for key, (*headers, body) in objects.items():
            if key.endswith((".metadata", "latest")):
                body = {**json.loads(body), **dict.fromkeys(("key", "url", "name", "version_id", "created_on"))}
                body["attempt"] = int(body["attempt"])  # outside of a task the library writes text
            found[key.replace(own, "OWN")] = [*headers, body]
        return found

    theirs = {key: value for key, value in objects(client).items() if "step-" not in key and "events" not in key}
    assert len(theirs) == len(ours) == 7
    assert alike(ours, entry.reference) == alike(theirs, plain)


def test_either_side_loads_what_the_other_saved(enter, tmp_path):
    import metaflow

    store = enter()
    entry = save(store, 1)
    made = tmp_path / "made"
    (made / "below").mkdir(parents=True)
    (made / "below" / "weights.bin").write_text("plain")
    plain = metaflow.Checkpoint().save(str(made), name="plain")
    single = metaflow.Checkpoint().save(str(made / "below" / "weights.bin"), name="single")
    packed = metaflow.Checkpoint().save(str(made), name="packed", storage_format="tar")
    assert {record["name"] for record in metaflow.Checkpoint().list()} == {"step-00000001", "plain", "single", "packed"}
    metaflow.Checkpoint().load(entry.reference, path=str(tmp_path / "theirs"))
    for name in ("theirs", store.open(entry)):
        assert Manifest.read(tmp_path / name).step == 1
    entries = {entry.reference["name"]: entry for entry in store.listing().entries}
    assert entries["plain"].reference == plain and entries["single"].reference == single
    assert (store.open(entries["plain"]) / "below" / "weights.bin").read_text() == "plain"
    assert (store.open(entries["single"]) / "weights.bin").read_text() == "plain"
    assert packed["name"] in entries
    assert (store.open(entries["packed"]) / "below" / "weights.bin").read_text() == "plain"


def test_a_training_is_killed_and_goes_on(enter, tmp_path):
    """The manager over it: restore, retention, events, another run."""
    straight = toy.run(tmp_path / "straight")
    for attempt, faults in enumerate(["raise@step=5", "raise@step=9", ""]):
        enter(attempt).close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FAULTS", faults)
            import metaflow

            if faults:
                with pytest.raises(CheckpointError, match="FAULTS"):
                    toy.run(metaflow.Checkpoint())
            else:
                assert toy.run(metaflow.Checkpoint()) == straight
    records, events, faults = Reader().records("Cloud/1")
    assert len(records) <= 4 and faults == []
    (events,) = events.values()
    assert [event["step"] for event in events if event["event"] == "resumed"] == [4, 8]
    enter(run="2").close()
    assert toy.run(metaflow.Checkpoint(), resume_from="1@12") == straight


def test_the_requests_of_a_save_do_not_grow(enter, server):
    store = enter()
    requests = {}
    for step in range(1, 31):
        requests[step] = server.count(lambda step=step: save(store, step))
    assert len(requests[3]) == len(requests[30]) == 8  # three files, two records, two pointers, the event
    assert {method for method, _ in requests[30]} == {"PUT"}
    assert [Path(path).name for _, path in requests[30]].index("manifest.json") == 2, "the manifest is the last file"
    listed = server.count(store.listing)
    assert len(listed) == 1 + 30 + 1  # the list, the records, the pointer
    deleted = server.count(lambda: store.delete(store.listing().entries[0]))[len(listed) :]
    assert len(deleted) == 4
    assert [entry.step for entry in store.listing().entries] == list(range(2, 31))
    assert len(server.count(lambda: enter(1))) < 10, "also a start"


def test_a_deletion_takes_what_is_named(enter, client):
    """Version 1 is not version 10."""
    backend = enter()._library.backend
    names = ["a.1/x", "a.1/y/z", "a.1", "a.10/x", "a.1.metadata"]
    for name in names:
        client.put_object(Bucket="bucket", Key=f"some/root/{name}", Body=b"")
    backend.delete_prefix("a.1")
    assert set(objects(client)) == {"a.10/x", "a.1.metadata"}
    backend.delete("a.1.metadata")
    assert set(objects(client)) == {"a.10/x"}


KILLED = """
import os, signal, sys; sys.path.insert(0, {tests!r})
import metaflow, test_s3
from common import s3
store = test_s3.MetaflowStore()
test_s3.save(store, 1)
before = s3.S3Backend._transfers
def transfers(self, way, pairs):
    if pairs[0][0].endswith("manifest.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    before(self, way, pairs)
s3.S3Backend._transfers = transfers
test_s3.save(store, 2)
"""


def test_killed_between_the_files_and_the_manifest(enter, client):
    import metaflow

    enter().close()
    done = subprocess.run([sys.executable, "-c", KILLED.format(tests=str(REPO / "tests"))], timeout=900)
    assert done.returncode == -signal.SIGKILL
    torn = {Path(key).name for key in objects(client) if ".step-00000002." in key}
    assert torn == {"state.json", "state.safetensors"}
    store = enter(1)
    assert [record["name"] for record in metaflow.Checkpoint().list()] == ["step-00000001"]
    assert [entry.step for entry in store.listing().entries] == [1]
    assert not any("step-00000002" in key for key in objects(client)), "the torn files were not swept"


def test_an_unreadable_record_is_mended(enter, client):
    store = enter()
    for step in (1, 2, 3):
        save(store, step)
    record = next(key for key in objects(client, METADATA) if ".step-00000002." in key)
    client.put_object(Bucket="bucket", Key=f"some/root/{record}", Body=b"{")
    listing = store.listing()
    assert [entry.step for entry in listing.entries] == [1, 2, 3] and "is mended from its copy" in listing.faults[0]
    assert store.listing().faults == []


def test_large_files_go_in_parts(enter, server, monkeypatch, client):
    monkeypatch.setattr("metaflow.metaflow_config.S3_SERVER_SIDE_ENCRYPTION", "AES256")
    store = enter()
    requests = server.count(lambda: save(store, 1, 20_000_000))
    assert [method for method, path in requests if path.endswith("/state.safetensors")] == [
        "POST",
        *3 * ["PUT"],
        "POST",
    ]
    assert {value[2] for value in objects(client).values()} == {"AES256"}
    (entry,) = store.listing().entries
    directory = store.open(entry)
    assert hash_file(directory / "state.safetensors") == Manifest.read(directory).files["state.safetensors"]


def test_a_file_outside_of_its_checkpoint_is_refused(enter, client):
    store = enter()
    entry = save(store, 1)
    client.put_object(Bucket="bucket", Key=f"some/root/{entry.key}/../outside", Body=b"")
    with pytest.raises(InvalidCheckpoint, match="has a file outside of its directory"):
        store.open(entry)


def test_errors_say_what_is_wrong(enter, client, monkeypatch):
    from metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.datastore.context import datastore_context

    monkeypatch.setattr("metaflow.metaflow_config.S3_CLIENT_RETRY_CONFIG", {"total_max_attempts": 1})
    datastore_context.switch_context({"type": "s3", "config": {"root": "s3://elsewhere/root"}})
    with pytest.raises(CheckpointError, match="s3://elsewhere/root/.* bucket does not exist.*SYSROOT_S3"):
        enter()
    datastore_context.switch_context({"type": "s3", "config": {"root": ROOT}})
    store = enter()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(CheckpointError, match="Unable to locate credentials"):
        enter()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match='Could not connect to the endpoint URL: "http://127.0.0.1:1'):
        Reader().records("Cloud")
    assert save(store, 1)  # which has its client


def test_a_record_that_cannot_be_asked_for_is_not_removed(enter, server, client, monkeypatch):
    """An outage while records are mended."""
    monkeypatch.setattr("metaflow.metaflow_config.S3_CLIENT_RETRY_CONFIG", {"total_max_attempts": 1})
    monkeypatch.setattr("metaflow.metaflow_config.S3_RETRY_COUNT", 0)
    store = enter()
    save(store, 1)
    (record,) = (key for key in objects(client, METADATA) if key.endswith(".metadata"))
    client.put_object(Bucket="bucket", Key=f"some/root/{record}", Body=b"{")
    server.refuse = lambda method, path: "/artifact_metadata/" in path and (503, "SlowDown")
    with pytest.raises(s3.S3Error, match="SlowDown"):
        store.listing()
    server.refuse = lambda method, path: None
    assert "is mended from its copy" in store.listing().faults[0]


def test_an_outage_and_new_credentials_are_survived(enter, server, monkeypatch, capsys):
    monkeypatch.setattr("metaflow.metaflow_config.S3_CLIENT_RETRY_CONFIG", {"total_max_attempts": 1})
    slept = []
    monkeypatch.setattr(s3.time, "sleep", slept.append)
    store = enter()
    refusals = [(503, "SlowDown"), (500, "InternalError"), (400, "ExpiredToken")]
    server.refuse = lambda method, path: path.endswith("/manifest.json") and refusals and refusals.pop(0)
    save(store, 1)
    assert not refusals and [entry.step for entry in store.listing().entries] == [1]
    assert len(slept) == 2 and capsys.readouterr().out.count("S3 does not answer, trying again") == 2
    server.refuse = lambda method, path: method == "PUT" and (403, "AccessDenied")
    with pytest.raises(s3.S3Error, match="AccessDenied"):
        save(store, 2)
    assert len(slept) == 2, "what will not pass is not waited for"
    server.refuse = lambda method, path: method == "PUT" and (503, "SlowDown")
    with pytest.raises(s3.S3Error, match="SlowDown"):
        save(store, 2)
    assert len(slept) == 2 + 7, "Metaflow's S3_RETRY_COUNT"


def test_a_save_that_is_refused_stops_the_training(enter, server):
    """With the error of a full disk: what was written before stays."""
    import metaflow

    enter().close()
    server.refuse = lambda method, path: method == "PUT" and "step-00000003" in path and (403, "AccessDenied")
    with pytest.raises(WriteFailed, match="step 3 could not be written.*AccessDenied.*checkpoint of step 2 is kept"):
        toy.run(metaflow.Checkpoint())
    assert [event["event"] for event in Reader().records()[1]["Cloud/1/train/7"]][-1] == "ended"


def test_another_version_of_the_library_keeps_its_way(enter, client, monkeypatch):
    """The negative control: without s3.py the same works as before."""
    import metaflow

    for attributes in ({}, {"TYPE": "gs"}, {"TYPE": "s3-compatible"}):
        unknown = SimpleNamespace(**attributes)
        assert s3.keep_client(unknown) is unknown
    monkeypatch.setattr(s3, "_DATASTRUCTURES", "metaflow_extensions.moved")
    store = enter()
    assert not isinstance(store._library.backend, s3.S3Backend) and store._library.private
    entry = save(store, 1)
    assert store.listing().entries == [entry] and metaflow.Checkpoint().list() == [entry.reference]
    assert Manifest.read(store.open(entry)).step == 1
    store.delete(entry)
    assert store.listing().entries == []
