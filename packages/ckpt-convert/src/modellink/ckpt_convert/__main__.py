# SPDX-License-Identifier: Apache-2.0
"""`python -m modellink.ckpt_convert` is `modellink-convert`."""

from modellink.ckpt_convert.cli import main

main()
