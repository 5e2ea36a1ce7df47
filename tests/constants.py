"""Places and flags that tests and conftest.py share."""

import os
from pathlib import Path

# XLA ends the process when a device is late for a collective; on a busy machine fake ones may be.
XLA_FLAGS = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=900"
)
EIGHT = "--xla_force_host_platform_device_count=8"
SHIPPED_GOLDEN = Path(__file__).parent / "golden"
GOLDEN = Path(os.environ.get("GOLDEN_DIR", SHIPPED_GOLDEN))
