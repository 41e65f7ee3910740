# SPDX-License-Identifier: Apache-2.0
"""Training data: samples of documents and instructions, their order, and which rank reads which."""
