# SPDX-License-Identifier: Apache-2.0
"""From option values to a checked `Run`, before any process starts."""
