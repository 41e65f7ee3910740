# SPDX-License-Identifier: Apache-2.0
"""The files of Megatron checkpoints: folders of ranks, names of weights in each dialect, distributed
checkpoints."""
