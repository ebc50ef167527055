"""How much hypothesis tries: everything in a full run, a third of it in `make unit`."""

from hypothesis import settings

settings.register_profile("quick", max_examples=30)
