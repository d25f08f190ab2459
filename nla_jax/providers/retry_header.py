"""How long a server asks to wait."""

import datetime
import email.utils
import math
from collections.abc import Mapping


def retry_after(headers: Mapping[str, str], now: datetime.datetime) -> float | None:
    """Seconds that a response asks to wait (Retry-After as seconds or as a date, retry-after-ms), or None."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                date = email.utils.parsedate_to_datetime(value)
            except ValueError:
                continue
            date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
            seconds = (date - now).total_seconds()
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None
