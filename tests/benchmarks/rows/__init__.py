"""One benchmark a file: `rows()` gives what `tests.benchmarks.bench` measures."""
