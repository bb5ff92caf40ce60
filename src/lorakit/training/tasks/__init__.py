"""What can be learned: one file per task, found because it is here."""

from lorakit.training.tasks.task import Task, Usual, find_task, task_names

__all__ = ["Task", "Usual", "find_task", "task_names"]
