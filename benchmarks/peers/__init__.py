"""unweave beside its peers: adapters over each library's own code, one timing harness, one data set.

`python benchmarks/engine.py` runs it all; `requirements.txt` says how to build the environment it needs.
"""
