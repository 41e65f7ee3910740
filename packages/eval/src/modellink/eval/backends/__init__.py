# SPDX-License-Identifier: Apache-2.0
"""Models to evaluate: the protocol (backend.py), a local checkpoint (local.py) and a server (endpoint.py)."""
