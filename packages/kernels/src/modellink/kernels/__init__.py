# SPDX-License-Identifier: Apache-2.0
"""Shared ground of the ModelLink packages: files, errors, progress, options, devices, parallel layouts and
ops."""

__version__ = "0.1.0"
