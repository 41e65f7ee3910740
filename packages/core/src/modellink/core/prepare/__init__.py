"""From option values to a checked `Run`, before any process starts."""
