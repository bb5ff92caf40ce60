"""Run trainings in processes that really kill themselves: a program for ``test_resume.py``, with jobs on stdin.

A job is one run folder, begun and then resumed as often as there are kills. Each attempt is a fork, so that many kills
cost little; a job without kills runs here first, and imports what the forks need. The exit status of each attempt is a
line on stdout.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from lorakit.training.fit import fit, resume
from lorakit.training.observe import Observer, Step


def kill() -> None:
    """End this process as nothing can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillsAtStep(Observer):
    """Kills the process in a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: Step) -> None:
        if step.step == self.at:
            kill()


def kill_at_write(number: int) -> None:
    """Kill the process at the n-th time that something in a folder of checkpoints is opened, made or renamed."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and "checkpoints" in str(arguments[0]):
            seen += 1
            if seen == number:
                kill()

    sys.addaudithook(hook)


def attempt(job: dict[str, Any], stop: dict[str, int]) -> None:
    """Begin the run, or go on with it, until the kill."""
    observer = KillsAtStep(stop["step"]) if "step" in stop else Observer()
    if "write" in stop:
        kill_at_write(stop["write"])
    output = Path(job["settings"]["output"])
    if (output / "config.yaml").is_file():
        resume(output, observer=observer)
    else:
        fit(job["model"], job["data"], observer=observer, **job["settings"])


def main() -> None:
    """Do each job."""
    for job in json.loads(sys.stdin.read()):
        if not job["kills"]:
            attempt(job, {})
        for stop in [*job["kills"], *[{}] * bool(job["kills"])]:
            child = os.fork()
            if child == 0:
                try:
                    attempt(job, stop)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    os._exit(1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            print(json.dumps({"output": job["settings"]["output"], "code": os.waitstatus_to_exitcode(status)}))


if __name__ == "__main__":
    main()
