"""What bench_replay.py asks of a routing trace, a module per question."""
