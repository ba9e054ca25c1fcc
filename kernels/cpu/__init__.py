"""The ops on NumPy arrays over the C++ extension `_cpu`. Importing this package alone loads neither."""
