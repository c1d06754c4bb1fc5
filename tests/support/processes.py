"""What a process does in the place of measuring; light to import, since every test starts one."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def killed(job: Any, sender: Any) -> None:
    """Ends as when the system has no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)


def failing(job: Any, sender: Any) -> None:
    """Ends with an exit code."""
    sys.exit(3)


def waiting(job: Any, sender: Any) -> None:
    """Writes its number to the file `job`, interrupts the process that started it, and waits for the end of that."""
    from heatkv.profiling.measure import worker

    threading.Thread(target=worker._end_with_parent, daemon=True).start()
    Path(job).write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGINT)
    threading.Event().wait()
