"""A pass over a few tokens in one compiled function, for CPUs: step.c the function, compiled.py how it is built, view.py which
models and passes it takes, int8.py smaller weights for it. Everything else runs core's model."""
