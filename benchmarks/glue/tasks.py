"""The tasks: their names and the rows of their training splits."""

from __future__ import annotations


TITLES = {
    "cola": "CoLA",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "rte": "RTE",
    "mnli": "MNLI",
    "snli": "SNLI",
    "sick": "SICK",
}
TRAINING_ROWS = {
    "cola": 8551, "mrpc": 3668, "stsb": 5749, "rte": 2490, "wnli": 635, "sst2": 67349, "qnli": 104743, "qqp": 363846,
    "mnli": 392702, "snli": 549367,
}  # fmt: skip


def title(task: str) -> str:
    """The name of a task as people write it."""
    return TITLES.get(task, task.upper())
