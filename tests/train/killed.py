"""Run by test_kill: one run that is killed by SIGKILL at random moments, beside one left alone.

Everything is imported once; each life of the run is a fork that starts with a fresh jax.
"""

import dataclasses
import json
import logging
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import optax
import orbax.checkpoint

from jaxllm.train import loop
from jaxllm.train.checkpoint import Checkpoints
from tests.train.runs import small

assert optax and orbax.checkpoint  # imported for the forks


class Events(logging.Handler):
    """The house's notes, one line each, to a pipe."""

    def __init__(self, pipe):
        super().__init__()
        self.pipe = pipe

    def emit(self, record):
        os.write(self.pipe, (record.getMessage().replace("\n", " ") + "\n").encode())


def live(config, pipe):
    """The life of a fork: never returns."""
    log = logging.getLogger("jaxllm")
    log.addHandler(Events(pipe))
    log.setLevel(logging.INFO)
    log.propagate = False
    ask = Checkpoints.latest

    def latest(self):
        log.info("begun")
        return ask(self)

    Checkpoints.latest = latest
    try:
        loop.train(config, quiet=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def one_life(config, early, after):
    """Fork, kill `after` seconds after the start or, unless `early`, after the programs are loaded.

    Returns:
      (exit status or None if killed, lines of its notes); after=None lets it end.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        live(config, write)
    os.close(write)
    text, deadline = b"", time.monotonic() + after if early else None
    while True:
        wait = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([read], [], [], wait)[0]:
            break
        part = os.read(read, 65536)
        if not part:
            break
        text += part
        if deadline is None and after is not None and b"begun\n" in text:
            deadline = time.monotonic() + after
    if after is not None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while part := os.read(read, 65536):
        text += part
    os.close(read)
    return (None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), text.decode().split("\n")


def numbers(lines, before, after=""):
    """The integers between two texts of notes."""
    return [
        int(line.removeprefix(before).removesuffix(after))
        for line in lines
        if line.startswith(before) and line.endswith(after)
    ]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r.get("val_loss")) for r in rows if "loss" in r]


def main(folder, kills, seed):
    chance = random.Random(seed)
    often = {"eval_every": 40, "eval_batches": 1, "keep_best": 1}
    steps = 40 * kills
    alone = small(folder, steps=steps, out=str(folder / "alone"), **often, checkpoint_every=steps)
    begun = time.monotonic()
    status, _ = one_life(alone, False, None)
    assert status == 0
    killed = dataclasses.replace(alone, out=str(folder / "killed"), checkpoint_every=2)
    checkpoints = folder / "killed" / "checkpoints"
    complete, during_saves, resumed, ends = 0, 0, [], []
    for _ in range(kills):
        early = chance.random() < 0.15
        status, lines = one_life(killed, early, chance.uniform(0.0, 0.6))
        assert status is None, f"it ended by itself with {status}"
        if ends and (starts := numbers(lines, "resumed from step ")):
            assert starts == [ends[-1]], f"resumed from {starts}, {ends[-1]} was the newest"
            resumed += starts
        complete = max([complete, *numbers(lines, "checkpoint ", " is complete")])
        names = [p.name for p in checkpoints.iterdir()] if checkpoints.exists() else []
        newest = max([0, *(int(n) for n in names if n.isdecimal())])
        assert newest >= complete, f"{complete} was complete, {newest} is the newest"
        during_saves += any("tmp" in name for name in names)
        ends.append(newest)
    status, lines = one_life(dataclasses.replace(killed, checkpoint_every=steps), False, None)
    assert status == 0
    assert numbers(lines, "resumed from step ") == [ends[-1]]
    assert losses(folder / "killed") == losses(folder / "alone")
    assert [row[0] for row in losses(folder / "killed")] == list(range(1, steps + 1))
    facts = {
        "kills": kills,
        "during_saves": during_saves,
        "lives_that_resumed": len(resumed),
        "killed_up_to_step": ends[-1],
        "steps": steps,
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
