# SPDX-License-Identifier: Apache-2.0
"""Context and expert parallelism: which tokens a rank holds, and how attention and experts exchange them."""
