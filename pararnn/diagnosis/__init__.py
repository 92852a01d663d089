"""Will a parallel method converge on a recurrence, how fast, and which."""

from ._diagnose import diagnose as diagnose
from ._diagnosis import Diagnosis as Diagnosis
