"""Serve the adapter of a run: with NVIDIA NIM on a machine with a GPU, elsewhere fused into its model by transformers.

python nim_lora/serve.py                        # your newest finished run, on http://127.0.0.1:8000
python nim_lora/serve.py RUN --nim --print      # only the command that would be run
"""

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from export import ExportError, add_options, check_name, export_run, find_run, load

from common import die_with_parent

# the NIM of a base model; another one is named with --image
IMAGES = {"meta-llama/Llama-3.1-8B-Instruct": "nvcr.io/nim/meta/llama-3.1-8b-instruct:2.0.8"}
CACHE = Path(os.environ.get("LOCAL_NIM_CACHE", Path.home() / ".cache/nim")).absolute()  # its downloads are kept here
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM, inside of NIM, takes as a limit


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU that the driver answers for."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).stdout.startswith(b"GPU")
    except (OSError, subprocess.TimeoutExpired):
        return False


def check_nim(options: argparse.Namespace) -> None:
    """Raise ExportError, before anything is written, if the container could not start here."""
    if options.max_lora_rank not in LORA_RANKS:
        raise ExportError(f"--max-lora-rank is {options.max_lora_rank}: NIM takes {', '.join(map(str, LORA_RANKS))}")
    if options.print:
        return
    if not os.environ.get("NGC_API_KEY"):
        raise ExportError(
            "NGC_API_KEY is not set: make a key on https://org.ngc.nvidia.com, export it as NGC_API_KEY, and run "
            "docker login nvcr.io"
        )
    if not shutil.which("docker"):
        raise ExportError("there is no docker on this machine: install it with the NVIDIA Container Toolkit")
    if not has_gpu():
        raise ExportError("there is no NVIDIA GPU on this machine; without --nim the fused model is served on the CPU")


def nim_command(base: str, options: argparse.Namespace) -> list[str]:
    """The docker command that serves the base model and all adapters. It has no secret in it."""
    image = options.image or IMAGES.get(base)
    if not image:
        raise ExportError(
            f"which NIM serves {base}? Give it with --image nvcr.io/nim/...; known are {', '.join(IMAGES)}"
        )
    source = options.adapters.absolute()  # of the same name in the container
    variables = {
        "NGC_API_KEY": None,  # docker takes it from the environment
        "NIM_PEFT_SOURCE": source,
        "NIM_PEFT_REFRESH_INTERVAL": options.refresh,
        "NIM_MAX_LORA_RANK": options.max_lora_rank,  # NIM 1
        "NIM_PASSTHROUGH_ARGS": f"--max-lora-rank {options.max_lora_rank}",  # NIM 2
    }
    command = ["docker", "run", "--rm", "--name", "nim-lora", "--gpus", "all", "--shm-size", "16g"]
    command += ["--user", f"{os.getuid()}:{os.getgid()}", "--publish", f"127.0.0.1:{options.port}:8000"]
    command += ["--volume", f"{source}:{source}:ro", "--volume", f"{CACHE}:/opt/nim/.cache"]
    for name, value in variables.items():
        command += ["--env", name if value is None else f"{name}={value}"]
    return [*command, image]


def transformers_command(options: argparse.Namespace) -> list[str]:
    """Serves the model that has the adapter's name in the Hub's cache."""
    return ["transformers", "serve", options.name, "--host", "127.0.0.1", "--port", str(options.port),
            "--device", "auto" if has_gpu() else "cpu"]  # fmt: skip


def run_server(command: list[str], environment: dict[str, str] | None = None) -> int:
    """Run a server until it ends or is interrupted. Returns its exit status."""
    server = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return server.wait()  # Ctrl-C reached it, too
    finally:
        server.terminate()
        server.wait()


def serve_fused(options: argparse.Namespace) -> int:
    """Serve the fused model of a run."""
    run = find_run(options.run)
    command = transformers_command(options)
    print(shlex.join(command), flush=True)
    if options.print:
        return 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", options.port))
        except (OSError, OverflowError) as error:
            raise ExportError(f"port {options.port} cannot be used: {error}. Choose another --port") from error
    with tempfile.TemporaryDirectory(prefix="nim-lora-") as cache:
        # laid out like a download of the Hub's client: such models it lists, and loads by name
        model, commit = Path(cache, f"models--{options.name}"), run["end"].task["weights_digest"].data[:40]
        load(run, "fused", model / "snapshots" / commit)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(commit)
        # the transformers of this environment, activated or not
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return run_server(command, {**os.environ, "PATH": path, "HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1"})


def serve_nim(options: argparse.Namespace) -> int:
    """Export the adapter of a run, and serve it with those that are there already."""
    check_nim(options)
    run = find_run(options.run)
    command = nim_command(run["end"].task["config"].data["base_model"], options)
    if options.print:
        print(shlex.join(command))
        return 0
    export_run(run, options)
    print(shlex.join(command), flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)  # docker would make it for root
    return run_server(command)


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve the adapter of a run, with NIM or without.")
    add_options(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--nim", action="store_true", default=None, help="NVIDIA NIM; by default where there is a GPU")
    kind.add_argument("--fused", dest="nim", action="store_false", help="the fused model, with transformers serve")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1")
    parser.add_argument("--image", help="the NIM of the base model, with a tag")
    parser.add_argument("--refresh", type=int, default=30, metavar="SECONDS", help="how often NIM looks for adapters")
    parser.add_argument("--print", action="store_true", help="print the command, and do not run it")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the way out that cleans up
    try:
        check_name(options.name)
        return serve_nim(options) if (has_gpu() if options.nim is None else options.nim) else serve_fused(options)
    except ExportError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.exit(main())
