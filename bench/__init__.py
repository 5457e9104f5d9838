"""Benchmarks: ours against its rivals in one process, interleaved; ratios of medians, losing shapes
included."""
