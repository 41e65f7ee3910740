# SPDX-License-Identifier: Apache-2.0
"""A compiled function for passes over a few tokens on a CPU.

step.c is the function, compiled.py builds it, model.py says which models and passes it supports and runs it,
int8.py quantizes the weights for it, measure.py compares its speed with core's model. All other passes run
core's model.
"""
