# SPDX-License-Identifier: Apache-2.0
"""How tensors are stored in files: safetensors, torch.save archives and their pickles; reading slices,
writing laid-out files."""
