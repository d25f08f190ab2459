"""The response headers by which a server asks to wait before a retry."""

import datetime
import email.utils
import math
from collections.abc import Mapping


def retry_after(headers: Mapping[str, str], now: datetime.datetime) -> float | None:
    """Return the seconds that a response asks to wait, or None if it does not.

    The headers are Retry-After, in seconds or as a date, and retry-after-ms.
    """
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
