"""Converting onto a disk that is really full: one clear line, nothing half-written, nothing lost."""

import shutil

import pytest
from disks import remount, small_disk, state, used
from verbs import CONVERSIONS, convert

PAGE = 4096


def is_full(place):
    return f"error: {place}: the disk is full, nothing was written there; make room and retry"


@pytest.mark.parametrize("verb", CONVERSIONS)
def test_a_full_disk(verb, tmp_path):
    """Full at the first file, in the middle, and at the last."""
    source = CONVERSIONS[verb].make(tmp_path / "source")
    before = state(source)
    with small_disk(tmp_path / "disk", 16 * 2**20) as disk:
        result = disk / "result"
        assert convert(verb, source, result).status == 0
        needed = used(disk)
        shutil.rmtree(result)
        for size in (2 * PAGE, needed // 2, needed - PAGE):
            remount(disk, f"size={size}")
            assert convert(verb, source, result).error == is_full(result)
            assert list(disk.iterdir()) == []
            assert state(source) == before
        remount(disk, f"size={2 * needed}")
        assert convert(verb, source, result).status == 0
        assert convert("verify", source, result).status == 0


@pytest.mark.parametrize("verb", CONVERSIONS)
def test_an_earlier_result_stays_when_the_disk_fills(verb, tmp_path):
    source = CONVERSIONS[verb].make(tmp_path / "source")
    with small_disk(tmp_path / "disk", 16 * 2**20) as disk:
        result = disk / "result"
        assert convert(verb, source, result, "--dtype", "float16").status == 0
        earlier, needed = state(result), used(disk)
        for size in (needed + 2 * PAGE, needed + needed // 2):
            remount(disk, f"size={size}")
            assert convert(verb, source, result, "--overwrite").error == is_full(result)
            assert [item.name for item in disk.iterdir()] == ["result"]
            assert state(result) == earlier
        remount(disk, f"size={4 * needed}")
        assert convert(verb, source, result, "--overwrite").status == 0
        assert [item.name for item in disk.iterdir()] == ["result"]
        assert convert("verify", source, result).status == 0
