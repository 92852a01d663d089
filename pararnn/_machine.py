"""The machine that a long run was done on, for its records."""

import os
import platform
from importlib.metadata import version
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "numpy")


def describe_machine() -> dict[str, Any]:
    """Return the device, the processor, its cores, the system and versions."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line for line in file if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
