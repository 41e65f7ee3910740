"""High availability: a run goes on when a rank of it fails.

    agent.py    starts the ranks of a machine, and starts them again
    watch.py    a thread of each rank: learns of failures anywhere, and frees its rank from collectives that will never end
    commit.py   a step changes the weights on all ranks or on none
    gasp.py     the survivors agree on a step and save it
    rebuild.py  a state in host memory, and the same training made anew around it
    replay.py   a step is undone and done again
    faults.py   faults for trials

`guard.py` is what the training loop sees of it.
"""
