"""What Sfumato has to say inside Flower's processes, whose own output Flower throws away."""

from __future__ import annotations

import logging
import os
from contextlib import suppress

# Names the file; on a node it stays on the node, which matters: what failed there may quote records.
LOG_FILE = "SFUMATO_LOG"
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def keep_log() -> None:
    """Append what the ``sfumato`` logger says to the file that the environment variable ``SFUMATO_LOG`` names.

    A new file is readable by its owner only.
    """
    name = os.environ.get(LOG_FILE)
    logger = logging.getLogger("sfumato")
    if not name or any(isinstance(handler, logging.FileHandler) for handler in logger.handlers):
        return
    with suppress(OSError):  # whatever is wrong with the file is said below
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600))
    handler = logging.FileHandler(name, delay=True)
    handler.setFormatter(logging.Formatter(_FORMAT))
    logger.addHandler(handler)
