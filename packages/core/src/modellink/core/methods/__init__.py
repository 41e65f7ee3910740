# SPDX-License-Identifier: Apache-2.0
"""The training methods of this package, one file each; registered by name as entry points (see train/method.py)."""
