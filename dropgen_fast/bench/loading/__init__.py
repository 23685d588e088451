"""The suite "loading" and what it shares with `benchmarks/bench_loading.py` and `benchmarks/bytes_read.py`.

Volumes to load, ways to load and augment them, processes that take turns, the count of bytes read, tables.
"""
