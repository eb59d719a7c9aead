"A few attempts of each kind to break it; `make hard` has more."

import pytest
from hard_use import KINDS, try_all


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_wrong_passes_in_silence(kind):
    counts, wrong = try_all(2, 0, [kind])
    assert wrong == [] and counts[kind]["tried"] >= 5
