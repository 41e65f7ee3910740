# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters and quantized base weights: changes to a built model, below the training loop."""
