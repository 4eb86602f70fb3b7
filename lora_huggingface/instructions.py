"""From instructions to tokens: read, fill the prompt template, split, tokenize, mask the prompts."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from settings import TrainConfig

from common import CheckpointManager, InvalidCheckpoint
from common.data import fingerprint

IGNORED = -100  # as a label: no loss here

Rows = list[dict[str, str]]  # instruction, input, output
Data = dict[str, np.ndarray]  # what prepare() returns


def read_rows(files: dict[str, str]) -> Rows:
    """Instructions from the texts of JSON (a list) or JSON Lines files, by their names.

    Raises ValueError, which names file and row, for anything else.
    """
    rows: Rows = []
    for name, text in sorted(files.items()):
        try:
            # not splitlines(), which also splits at characters that a text may have in it, such as U+2028
            lines = filter(str.strip, text.split("\n"))
            found = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, lines))
        except ValueError as error:
            raise ValueError(f"{name} is neither JSON nor JSON Lines: {error}") from error
        for number, row in enumerate(found, 1):
            fields = {key: row.get(key) or "" for key in ("instruction", "input", "output")} if row else {}
            if not all(fields.get(key) for key in ("instruction", "output")) or set(map(type, fields.values())) != {
                str
            }:
                raise ValueError(f"{name}, row {number}: it needs an instruction and an output, both texts")
            rows.append(fields)
    if not rows:
        raise ValueError("there are no instructions: the data set has no .json or .jsonl file with rows")
    return rows


def json_files(directory: Path) -> dict[str, str]:
    """The texts of the JSON files in a directory, by their names; not what the Hub's libraries note about them."""
    return {
        str(path.relative_to(directory)): path.read_text(encoding="utf-8")
        for path in directory.rglob("*.json*")
        if path.suffix in (".json", ".jsonl") and path.name != "dataset_infos.json"
    }


def prepare(config: TrainConfig, rows: Rows, base: Path, checkpoints: CheckpointManager | None = None) -> Data:
    """Split, fill the template and tokenize, shard by shard; what an earlier start has finished is not done again.

    Args:
        base: the directory with the tokenizer.
        checkpoints: keeps each finished shard; None: nothing is kept.

    Returns:
        ``rows`` (which one each is, in a random order), ``tokens`` (of all of them, one after the other), ``lengths``
        (tokens of each; 0 when cutoff_len leaves nothing of its answer), ``prompts`` (how many of them are the prompt).
        The first val_set_size rows are for validation.
    """
    if config.val_set_size >= len(rows):
        raise ValueError(
            f"val_set_size is {config.val_set_size}, and there are {len(rows)} rows: none is left to train"
        )
    tokenizer = load_tokenizer(base)
    order = np.random.default_rng(config.seed).permutation(len(rows)).astype(np.int32)
    shards = np.split(order, range(config.shard_size, len(rows), config.shard_size))
    finished: list[Any] = []  # the checkpoint of each shard
    if checkpoints is not None:
        decisive = ("base_model", "revision", "prompt_template", "cutoff_len", "seed", "shard_size")
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        newest = checkpoints.restore_files(
            {"rows": digest, **{name: getattr(config, name) for name in decisive}}, total_steps=len(shards)
        )
        if newest is not None:
            finished = [*json.loads((newest / "earlier.json").read_text()), checkpoints.latest]
    parts: list[Data] = []
    for number, shard in enumerate(shards):
        if checkpoints is not None and number < len(finished):
            try:
                parts.append(load_file(checkpoints.load_files(finished[number]) / "shard.safetensors"))
                continue
            except InvalidCheckpoint as error:
                print(f"shard {number + 1} is damaged and is tokenized again: {error}", flush=True)
        parts.append(tokenize(config, tokenizer, [rows[row] for row in shard]))
        if checkpoints is not None and number == len(finished):
            folder = checkpoints.directory / f"shard-{number + 1}"
            folder.mkdir()
            save_file(parts[-1], folder / "shard.safetensors")
            (folder / "earlier.json").write_text(json.dumps(finished))
            # with a name it stays when the next one comes; save_files is no training step, so FAULTS=kill@step=N of
            # the training does not fire here
            checkpoints.save_files(folder, step=number + 1, name=f"shard-{number + 1:06}")
            finished.append(checkpoints.latest)  # waits until it is stored
            print(f"shard {number + 1}/{len(shards)}  {len(shard)} rows  {len(parts[-1]['tokens'])} tokens", flush=True)
            checkpoints.stop_if_asked(lambda: None)
    data = {name: np.concatenate([part[name] for part in parts]) for name in ("tokens", "lengths", "prompts")}
    if lost := int((data["lengths"] == 0).sum()):
        print(f"{lost} of {len(rows)} rows are left out: cutoff_len={config.cutoff_len} leaves nothing of their answer")
    return {"rows": order, **data}


def fingerprint_of(data: Data) -> str:
    """16 hex digits that are others when anything in the data is."""
    return fingerprint(*(data[name] for name in sorted(data)))


def load_tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer  # it takes seconds, and the flow reads rows without it

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def tokenize(config: TrainConfig, tokenizer: Any, rows: Rows) -> Data:
    tokens: list[int] = []
    lengths, prompts = [], []
    for row in rows:
        prompt, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in fill(config, tokenizer, row)
        )
        kept = (prompt + answer)[: config.cutoff_len] if len(prompt) < config.cutoff_len else []
        tokens += kept
        lengths.append(len(kept))
        prompts.append(min(len(prompt), len(kept)))
    found = {"tokens": tokens, "lengths": lengths, "prompts": prompts}
    return {name: np.array(values, np.int32) for name, values in found.items()}


def fill(config: TrainConfig, tokenizer: Any, row: dict[str, str]) -> tuple[str, str]:
    """The text up to the answer, and the answer with what ends it."""
    if config.prompt_template == "alpaca":
        given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
        # tokenize() adds no special tokens: a chat template writes its own
        prompt = f"{tokenizer.bos_token or ''}### Instruction:\n{row['instruction']}{given}\n\n### Response:\n"
        return prompt, row["output"] + tokenizer.eos_token
    if not tokenizer.chat_template:
        raise ValueError(f"{config.base_model} has no chat template: set prompt_template to alpaca")
    question = {"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row["input"])))}
    answer = {"role": "assistant", "content": row["output"]}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            f"the chat template of {config.base_model} writes a prompt differently once it is answered, so nobody can "
            "tell where the answer begins: set prompt_template to alpaca"
        )
    return prompt, whole[len(prompt) :].rstrip()


class Examples:
    """Tokenized rows, to train or to validate with. A prompt has no labels, so the loss is on answers only."""

    def __init__(self, config: TrainConfig, data: Data, *, validation: bool) -> None:
        part = slice(config.val_set_size) if validation else slice(config.val_set_size, None)
        tokens = np.split(data["tokens"], np.cumsum(data["lengths"])[:-1])[part]
        found = zip(data["rows"][part], tokens, data["prompts"][part], strict=True)
        self.examples = [(int(row), ids.tolist(), int(prompt)) for row, ids, prompt in found if len(ids)]
        if not self.examples:
            raise ValueError(f"cutoff_len={config.cutoff_len} leaves no answer in these {len(tokens)} rows: raise it")

    @property
    def rows(self) -> list[int]:
        """Where each one stands in the data set."""
        return [row for row, _, _ in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        _, tokens, prompt = self.examples[index]
        return {"input_ids": tokens, "labels": [IGNORED] * prompt + tokens[prompt:]}
