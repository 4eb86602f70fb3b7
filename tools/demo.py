"""``make demo``: the same flow twice, once left alone and once killed in the middle of an epoch, then compared."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOW = ROOT / "mnist_torch_vanilla" / "flow.py"
KILL_AT = 100  # step 100 is in the fifth epoch of 23 steps

READ_RUN = """
import json, sys
from metaflow import Run, namespace
namespace(None)
run = Run(sys.argv[1])
data = run["end"].task.data
print(json.dumps({"history": data.history, "weights": data.weights_digest, "resumed_from": data.resumed_from,
                  "accuracy": data.accuracy}))
"""


def run_flow(title: str, scratch: Path, faults: str) -> dict:
    """Run the flow in a datastore of its own, show its lines, and return the run's artifacts."""
    print(f"\n=== {title}\n", flush=True)
    env = {
        **os.environ,
        "FAULTS": faults,
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(scratch),
        "METAFLOW_CARD_LOCALROOT": str(scratch / "cards"),
        "METAFLOW_HOME": str(scratch / "home"),
        "METAFLOW_USER": "demo",
        "METAFLOW_DEFAULT_DATASTORE": "local",
        "METAFLOW_DEFAULT_METADATA": "local",
    }
    id_file = scratch / "run_id"
    command = [sys.executable, str(FLOW), "run", "--run-id-file", str(id_file)]
    with subprocess.Popen(
        command, cwd=scratch, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as flow:
        for line in flow.stdout:
            # "2026-01-01 12:00:00.000 [17/train/2 (pid 1)] text": the task and its text are what matters here
            match = re.match(r"[-0-9]+ [:.0-9]+ \[[0-9]+/(train|evaluate)/[0-9]+ \(pid [0-9]+\)\] (.*)", line)
            if match and "[@model]" not in line:
                print(f"  {match[1]:8} | {match[2]}", flush=True)
    if flow.returncode:
        sys.exit(f"the flow failed with exit status {flow.returncode}")
    pathspec = f"MnistTorchFlow/{id_file.read_text().strip()}"
    found = subprocess.run(
        [sys.executable, "-c", READ_RUN, pathspec], env=env, cwd=scratch, check=True, capture_output=True
    )
    return json.loads(found.stdout)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        for part in ("plain", "killed"):
            (Path(name) / part).mkdir()
        straight = run_flow("The uninterrupted run", Path(name, "plain"), "")
        killed = run_flow(
            f"The same, killed with SIGKILL at step {KILL_AT}", Path(name, "killed"), f"kill@step={KILL_AT}"
        )
    resumed = killed["resumed_from"]
    identical = killed["weights"] == straight["weights"] and killed["history"] == straight["history"]
    print("\n=== What happened\n")
    print(f"  validation accuracy                       {killed['accuracy']:.2%}")
    print(f"  killed at step                            {KILL_AT}")
    print(f"  resumed at step                           {', '.join(map(str, resumed)) or 'never'}")
    for step in resumed:
        print(f"  steps trained twice                       {KILL_AT - step} (those after the last checkpoint)")
    print(f"  weights, uninterrupted                    {straight['weights'][:32]}")
    print(f"  weights, killed and resumed               {killed['weights'][:32]}")
    print(f"  identical to the uninterrupted run: {'yes' if identical and resumed else 'NO'}")
    return 0 if identical and len(resumed) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
