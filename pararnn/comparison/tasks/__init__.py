"""Tasks that tell recurrences apart, generated or from real bytes and images."""

from ._registry import (
    IMAGE_TASKS as IMAGE_TASKS,
    list_tasks as list_tasks,
    make_task as make_task,
)
from ._task import (
    Example as Example,
    Lengths as Lengths,
    Metric as Metric,
    Sampler as Sampler,
    Scored as Scored,
    Task as Task,
    draw_batch as draw_batch,
)
