# SPDX-License-Identifier: Apache-2.0
"""Memory savings in a built model: recomputation, offloading, shared fp32 and bf16 parameters."""
