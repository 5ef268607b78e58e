"""What benchmarks share, so that each of them holds its question alone.

``options``     the command line's common options, directories, SIGTERM
``models``      demo models of the measured shapes
``server``      a `vllm serve` process: start, wait for /health, read, stop
``serving``     servers with the options that all benchmarks give them, their logs and counters
``completions`` prompts and completions, timed
``engine``      an engine in a process of its own
``cgroup``      limits on memory
``page_cache``  the page cache, emptied or filled
``pairing``     rounds in which contestants take turns, confidence intervals
``machine``     hardware, versions, commit
``report``      the JSON report and the table of bars
"""
