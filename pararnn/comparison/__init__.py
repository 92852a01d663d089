"""Comparing recurrences; needs `pip install 'pararnn[compare]'`."""

from .._jsonl import read_records as read_records
from ._compare import compare as compare
from ._model import expand_layer as expand_layer, list_layers as list_layers
from ._protocol import BUDGETS as BUDGETS, Protocol as Protocol
from ._report import write_report as write_report
from .tasks import (
    Example as Example,
    Lengths as Lengths,
    Metric as Metric,
    Task as Task,
    draw_batch as draw_batch,
    list_tasks as list_tasks,
    make_task as make_task,
)
