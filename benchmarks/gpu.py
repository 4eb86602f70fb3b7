"""On a machine with a GPU: how long a save blocks a model with a billion parameters, and how fast it trains.

python benchmarks/gpu.py --steps 200 --save-every 50

The state lies on the GPU: weights, Adam's two moments and the steps, 12 bytes a parameter in fp32. Each way saves at
the same steps of the same loop; what is printed are absolute figures with the card's name.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from measure import state_dicts

import common


def main(arguments):
    import torch
    import torch.distributed.checkpoint as dcp

    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: this benchmark needs one")
    width = 128 * round((arguments.parameters / 12 / 24) ** 0.5 / 128)
    layers = [torch.nn.TransformerEncoderLayer(width, 16, 4 * width, batch_first=True) for _ in range(24)]
    model = torch.nn.Sequential(*layers).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = torch.randn(8, 128, width, device="cuda")
    count = sum(parameter.numel() for parameter in model.parameters())
    folder = Path(tempfile.mkdtemp(dir=arguments.directory))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def one_step():
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(batch).square().mean().backward()
        optimizer.step()

    def loop(save, finish):
        blocked = []
        torch.cuda.synchronize()
        began = time.perf_counter()
        for number in range(1, arguments.steps + 1):
            one_step()
            if number % arguments.save_every == 0:
                torch.cuda.synchronize()  # what is waited for below is the save alone
                before = time.perf_counter()
                save()
                blocked.append(time.perf_counter() - before)
        torch.cuda.synchronize()
        spent = time.perf_counter() - began
        finish()
        return {"blocked ms": statistics.median(blocked) * 1000 if blocked else 0.0,
                "steps a second": arguments.steps / spent, "seconds": spent}  # fmt: skip

    pending = []

    def dcp_save():
        dcp_wait()
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        pending.append(dcp.async_save(state_dicts(model, optimizer), checkpoint_id=str(folder / "dcp")))

    def dcp_wait():
        while pending:
            pending.pop().result()

    results = {}
    for _ in range(3):
        one_step()
    with common.CheckpointManager(folder / "common", save_every="10h") as checkpoints:
        state = common.TrainState(model=model, optimizer=optimizer)
        checkpoints.restore(state)

        def ours():
            state.step += 1
            checkpoints.save(state)

        ours()  # the buffer is allocated and page-locked once
        _ = checkpoints.latest
        ways = {
            "no checkpoints": (lambda: None, lambda: None),
            "common": (ours, lambda: checkpoints.latest),
            "torch.save": (lambda: torch.save(state_dicts(model, optimizer), folder / "state.pt"), lambda: None),
            "DCP async_save": (dcp_save, dcp_wait),
        }
        for name, (save, finish) in ways.items():
            results[name] = loop(save, finish)
            print(f"{name}: {results[name]}", flush=True)
        began = time.perf_counter()
        checkpoints.restore(state)
        torch.cuda.synchronize()
        results["restore, common"] = {"seconds": time.perf_counter() - began}
    began = time.perf_counter()
    saved = torch.load(folder / "state.pt", weights_only=True, map_location="cuda")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.cuda.synchronize()
    results["restore, torch.load"] = {"seconds": time.perf_counter() - began}
    shutil.rmtree(folder)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "parameters": count,
             "state GB": count * 12 / 1e9, "save every": arguments.save_every}  # fmt: skip
    print(json.dumps({**about, **results}, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**about, **results}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--directory", help="where the checkpoints are written; default: a temporary directory")
    parser.add_argument("--json", default="")
    main(parser.parse_args())
