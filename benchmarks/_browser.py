"""The browser of this machine that opens pages."""

from __future__ import annotations

import shutil
from typing import Any

# As root Chromium runs without its sandbox only.
_ARGUMENTS = ["--no-sandbox"]
_NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = "There is no Chromium here; on Debian `make browser` installs it."


def launch_options() -> dict[str, Any] | None:
    """Return Playwright's options for launching Chromium, or None if Chromium is not installed."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    return None if found is None else {"executable_path": found, "args": _ARGUMENTS}
