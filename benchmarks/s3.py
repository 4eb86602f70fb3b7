"""What a save and a listing cost on S3, beside plain ``current.checkpoint.save()`` and ``.list()``.

python benchmarks/s3.py [--quick] [--json FILE]

The server is moto on loopback, in a process of its own: what is seen is the work of the client, and a real network
adds its round trips to each request. Both sides take turns in one task of a flow. The managed side is the commit of a
staged directory with its line in the event log; the directories of both sides have the same files.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from measure import MEGABYTE, Row, report, take_turns, versus
from metaflow import FlowSpec, checkpoint, current, step

from common.manifest import Manifest, hash_file

MB = int(MEGABYTE)
LISTED = 40  # checkpoints


class S3Benchmark(FlowSpec):
    @checkpoint(load_policy="none", show_card=False)
    @step
    def start(self):
        settings = json.loads(os.environ["S3_BENCHMARK"])
        Path(settings["result"]).write_text(json.dumps(compare(settings["sizes"], settings["rounds"], settings["log"])))
        self.next(self.end)

    @step
    def end(self):
        pass


def compare(sizes, rounds, log):
    """The rows, measured in a task."""
    from common.metaflow_store import MetaflowStore

    store, requests = MetaflowStore(), []

    def fill(directory, size):
        (directory / "state.safetensors").write_bytes(os.urandom(size))
        (directory / "state.json").write_text('{"step": 1}')
        files = {path.name: hash_file(path) for path in directory.iterdir()}
        manifest = Manifest(len(requests), None, len(requests), {"loss": 0.1}, {}, {}, files)
        manifest.write(directory)
        return manifest

    def today(size):
        directory = store.work_directory()
        fill(directory, size)
        return timed(lambda: current.checkpoint.save(str(directory), name="plain"))

    def managed(size):
        directory = store.stage()
        manifest = fill(directory, size)

        def save():
            store.commit(directory, manifest)
            store.events.add("saved", step=manifest.step, metrics=manifest.metrics, bytes=size, seconds=0.1)

        before = asked()
        spent = timed(save)
        requests.append(asked() - before)
        return spent

    def asked():
        return Path(log).read_text().count("HTTP/1.1")

    rows = []
    for size, goal in sizes:
        ways = {"today": partial(today, size), "common": partial(managed, size)}
        rows += versus(f"s3 save, {size // MB} MB", take_turns(ways, rounds), "common", {"today": goal})
    while len(store.listing().entries) < LISTED:
        managed(1000)
    ways = {"today": partial(timed, current.checkpoint.list), "common": partial(timed, store.listing)}
    rows += versus(f"s3 listing of {LISTED}", take_turns(ways, 5), "common", {"today": 0.1})
    while len(requests) < 30:
        managed(1000)
    values = {"3rd": requests[2], "30th": requests[29]}
    rows.append(Row("s3 requests of the 30th save", "of the 3rd", values["30th"] / values["3rd"], 1.0, values))
    return [asdict(row) for row in rows]


def timed(function):
    """How long a call takes, in seconds."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def run(sizes, rounds):
    """The measurements, of a flow against a server that lives as long."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="s3-benchmark-") as name:
        log, result = Path(name, "requests"), Path(name, "result")
        environment = {
            **os.environ, "METAFLOW_DEFAULT_DATASTORE": "s3", "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bucket/metaflow",
            "METAFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "METAFLOW_DEFAULT_METADATA": "local", "METAFLOW_DATASTORE_SYSROOT_LOCAL": name, "METAFLOW_HOME": name,
            "METAFLOW_USER": "benchmark",
            "S3_BENCHMARK": json.dumps({"sizes": sizes, "rounds": rounds, "log": str(log), "result": str(result)}),
        }  # fmt: skip
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL, stderr=log.open("w"),
        )  # fmt: skip
        try:
            create_bucket(f"http://127.0.0.1:{port}")
            flow = [sys.executable, str(Path(__file__).resolve()), "run"]
            done = subprocess.run(flow, cwd=name, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stdout[-5000:] + done.stderr[-5000:])
            return json.loads(result.read_text())
        finally:
            server.kill()
            server.wait()


def create_bucket(url):
    """Make the bucket as soon as the server answers."""
    import boto3
    from botocore.exceptions import BotoCoreError

    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    for _ in range(100):
        try:
            return client.create_bucket(Bucket="bucket")
        except BotoCoreError:
            time.sleep(0.2)
    sys.exit("the server did not start")


if __name__ == "__main__":
    if "S3_BENCHMARK" in os.environ:
        S3Benchmark()
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 MB only, fewer rounds")
    parser.add_argument("--json", help="append the rows to this file")
    arguments = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.2f} at the start")
    # with more bytes the server's own work is most of it
    measured = run([(MB, 0.1)], 5) if arguments.quick else run([(MB, 0.1), (16 * MB, 1.0)], 7)
    report([Row(**row) for row in measured], arguments.json)
