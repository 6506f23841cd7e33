"""The one volume in a file's folder, or the reason why it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_curation.volumes import Volume, VolumeError, find, read


def volume(path: Path) -> Volume:
    found = list(find(path.parent))
    assert len(found) == 1, found
    return read(found[0])


def refused(path: Path, reason: str) -> str:
    with pytest.raises(VolumeError) as caught:
        volume(path)
    assert caught.value.reason == reason
    return str(caught.value)
