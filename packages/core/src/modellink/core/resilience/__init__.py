# SPDX-License-Identifier: Apache-2.0
"""High availability: a run survives the failure of a rank.

    agent.py      starts and restarts the ranks of a machine
    watch.py      a thread of each rank that learns of failures and frees its rank from collectives that cannot complete
    commit.py     a step changes the weights on all ranks or on none
    survivors.py  the surviving ranks agree on a step to save
    rebuild.py    a snapshot in host memory, and the same training rebuilt over other ranks or process groups
    replay.py     undoes a step, so that it can be repeated
    faults.py     injects faults for tests
    guard.py      implements the interface of the training loop (train/guard.py)
"""
