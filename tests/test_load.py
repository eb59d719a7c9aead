"Much at once, and much in memory, in short; `make load` has more."

import os

import pytest
from load import collect, notebooks, walk

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="what runs is read from /proc")


def test_a_few_notebooks_leave_nothing():
    found = notebooks(4, 2)
    assert found["right"] == 4 and not any(found["left"].values()), found


def test_memory_is_measured():
    assert walk(30)["sub-tasks"] == 30
    found = collect(200)
    assert found["units"] == 4160 and found["megabytes more"] < 50 * found["megabytes of masks"] + 200
