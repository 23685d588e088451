"""What `bench_loading.py` is made of: volumes to load, ways to load and augment them, processes that take turns, tables."""
