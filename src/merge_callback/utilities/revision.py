"""The git revision of the working directory, for provenances."""

import subprocess


def git_revision() -> str | None:
    """Returns the commit that is checked out in the working directory, with ``-dirty`` if files differ from it.

    Returns:
        The revision; None without git, or outside a repository.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
