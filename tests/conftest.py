"""Settings of all tests: no example is timed, because a busy machine is not a failure.

Where `CI` is set the examples are the same in every run, so that a merge does not depend on luck; everywhere else they
are drawn anew each time, which is how rare cases are found."""

import os

from hypothesis import settings

settings.register_profile("modnb", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("modnb")
