"""Train in one of several processes: a program for ``test_processes.py``, with a job on argv."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from safetensors.torch import save_file

from lorakit.errors import TrainingError
from lorakit.training.fit import fit, resume
from lorakit.training.observe import Observer, Step


class Watch(Observer):
    """Kills every process at a step, or stops them as Ctrl-C would; seen in the main process alone."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def step(self, step: Step) -> None:
        if step.step == self.job.get("break_at"):
            raise TrainingError("the power went out")
        if step.step == self.job.get("stop_at"):
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Do the job, and leave this process's adapter and summary beside the run folder."""
    job = json.loads(sys.argv[1])
    output = job["settings"]["output"]
    if job.get("resume"):
        result = resume(output, observer=Watch(job))
    else:
        result = fit(job["model"], job["data"], observer=Watch(job), **job["settings"])
    rank = os.environ.get("RANK", "0")
    tensors = {name: p.detach().clone() for name, p in result.handle.parameters().items()}
    save_file(tensors, f"{output}-rank{rank}.safetensors", {"loss": repr(result.summary.after.loss)})


if __name__ == "__main__":
    main()
