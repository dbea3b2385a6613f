"""What a job has to say: results as data, progress while it runs, tables at the end."""

from rotq.report.progress import Progress
from rotq.report.results import (
    BlockResult,
    Estimate,
    Flatness,
    JobReport,
    LayerResult,
    SiteEstimate,
    peak_rss,
    quarters,
)

__all__ = [
    "BlockResult",
    "Estimate",
    "Flatness",
    "JobReport",
    "LayerResult",
    "Progress",
    "SiteEstimate",
    "peak_rss",
    "quarters",
]
