# SPDX-License-Identifier: Apache-2.0
"""Reports of a run: tables on the terminal, CSV, an HTML page, and the comparison of two runs."""
