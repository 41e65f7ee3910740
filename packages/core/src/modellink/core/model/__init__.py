# SPDX-License-Identifier: Apache-2.0
"""A ModelSpec as a model over megatron-core's transformer block, and its weights from any checkpoint."""
