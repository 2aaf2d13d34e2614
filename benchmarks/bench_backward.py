"""`python -m benchmarks.bench_backward`: the gradient of a graph that is kept, and forward and backward together."""

import sys

from benchmarks.runner import main

if __name__ == "__main__":
    main("bench_backward", ("backward", "both"), "Time the gradient against softmax's and entmax's.", sys.argv[1:])
