"""`python -m benchmarks.bench_forward`: the weights alone, without a graph. benchmarks/shapes.py lists the cells."""

import sys

from benchmarks.runner import main

if __name__ == "__main__":
    main("bench_forward", ("forward",), "Time the forward pass against softmax and entmax.", sys.argv[1:])
