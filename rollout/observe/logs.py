"""Log lines for people or for machines, from records whose facts are in `extra=`.

json   {"time": "2026-01-31T12:00:00.123456Z", "level": "debug", "logger": "zerokl.rollout.request_life",
        "event": "request admitted", "request_id": "generate-0-0/0", "rank": 1, ...}, one object a line
text   2026-01-31T12:00:00.123456Z DEBUG zerokl.rollout.request_life: request admitted request_id=generate-0-0/0 rank=1
"""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any, Literal, get_args

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[str, ...] = get_args(LogLevel)
FORMATS: tuple[str, ...] = get_args(LogFormat)

_OWN_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
"""What every record has; the rest came from `extra=`."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, event, what `extra=` has, and an error's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in _extra(record).items() if name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """The same for people: the facts as name=value behind the event."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        facts = "".join(f" {name}={_shown(value)}" for name, value in _extra(record).items())
        line = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}{facts}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure_logging(level: LogLevel, form: LogFormat) -> None:
    """Have the process's log lines written to stderr, unless it has handlers already; for programs."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _time(record: logging.LogRecord) -> str:
    time = datetime.fromtimestamp(record.created, timezone.utc)
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return json.dumps(text) if not text or any(character.isspace() or character == '"' for character in text) else text
