"""Kills a command again and again at random moments; run by test_kill.py in a process of its own, which forks.

Argument: JSON of "call" (a name in qlora_rs.checkpoint), three paths, the "arguments" of the call, "kills" and "seed".
Prints JSON of what happened. The interpreter is warm when it forks, so that the kills meet the work and not imports.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from qlora_rs import checkpoint


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(task: dict[str, object], delay: float | None) -> bool:
    """Run the command in a child, killed after ``delay`` seconds; returns whether it ended by itself."""
    child = os.fork()
    if child == 0:
        try:
            getattr(checkpoint, task["call"])(task["source"], task["target"], **task["arguments"])
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), status
    return os.waitstatus_to_exitcode(status) == 0


def main() -> None:
    task = json.loads(sys.argv[1])
    target, source = Path(task["target"]), Path(task["source"])
    chance = random.Random(task["seed"])
    before, expected = content(source), content(Path(task["expected"]))
    start = time.monotonic()
    run(task, None)
    duration = time.monotonic() - start
    assert content(target) == expected, "uninterrupted"
    shutil.rmtree(target)
    seen = {"kills": 0, "whole": 0, "in_work": 0, "resumed": 0}
    while seen["kills"] < task["kills"]:
        # Short ones too: a run that resumes has little left to do.
        ended = run(task, duration * 1.1 * chance.random() ** 2)
        seen["kills"] += not ended
        assert content(source) == before, "the source was touched"
        beside = sorted(path.name for path in target.parent.iterdir() if target.name in path.name)
        if target.exists():
            assert content(target) == expected, "killed, but not whole"
            seen["whole"] += 1
            for name in beside:
                path = target.parent / name
                path.unlink() if path.is_file() else shutil.rmtree(path)
            continue
        assert not ended, "done, but absent"
        seen["in_work"] += 1
        if chance.random() < 0.3:
            assert run(task, None)
            seen["resumed"] += 1
            assert content(target) == expected, f"resumed after {beside}"
            assert sorted(path.name for path in target.parent.iterdir() if target.name in path.name) == [target.name]
            shutil.rmtree(target)
    if not target.exists():
        assert run(task, None)
        assert content(target) == expected, "resumed at the end"
    print(json.dumps({**seen, "seconds": duration}))


main()
