"""Comparing recurrences; needs `pip install 'pararnn[compare]'`."""

from .tasks import (
    Example as Example,
    Lengths as Lengths,
    Metric as Metric,
    Task as Task,
    draw_batch as draw_batch,
    list_tasks as list_tasks,
    make_task as make_task,
)
