"""Settings of all tests: no example is timed, because a busy machine is not a failure."""

from hypothesis import settings

settings.register_profile("modnb", deadline=None)
settings.load_profile("modnb")
