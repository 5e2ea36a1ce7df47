"""How much a server takes on."""

import dataclasses
from typing import Annotated

from magnet_jax.arguments import RARE, Between, check_fields
from magnet_jax.config import Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server refuses, and when it gives up."""

    max_batch: Annotated[int, Between(1, 256)] = 8
    """Clips made at once. They are filled up to 1, 2, 4, 8, 16, ...: a program for each."""
    queue: Annotated[int, Between(1, 10_000)] = 64
    """Jobs that wait; the next one is answered with 429."""
    queue_per_client: Annotated[int, Between(1, 10_000)] = 16
    """The same of one client: of a key, or of an address where there are no keys."""
    text: Annotated[int, Between(1, 1_000_000), RARE] = 2000
    """Characters of a text."""
    clips: Annotated[int, Between(1, 100)] = 8
    """Clips of a job."""
    seconds: Annotated[float, Between(0, 3600, above=True)] = 600.0
    """Seconds of a clip."""
    upload_mb: Annotated[float, Between(0, 10_000, above=True)] = 50.0
    """Megabytes of an uploaded file."""
    upload_seconds: Annotated[float, Between(0, 36_000, above=True)] = 600.0
    """Seconds of sound in an uploaded file."""
    body_mb: Annotated[float, Between(0, 100, above=True), RARE] = 1.0
    """Megabytes of any other request."""
    job_seconds: Positive = 60.0
    """Seconds that a job may take from its start; more where twice the estimate is more."""
    keep_seconds: Positive = 3600.0
    """Seconds for which results and uploads are kept."""
    keep_mb: Positive = 2000.0
    """Megabytes of them that are kept; the oldest go first."""

    def __post_init__(self):
        check_fields(self, "limits.")
