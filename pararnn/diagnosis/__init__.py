"""Which parallel methods converge on a recurrence, and how fast."""

from ._diagnose import diagnose as diagnose
from ._report import Diagnosis as Diagnosis
