"""llama.cpp as bench_llamacpp.py runs it: an environment of its own, weights, a process.

``install``     an environment with llama-cpp-python, built here from its sdist
``weights``     GGUF files of a checkpoint, and how many of their bytes are experts
``quantise``    runs in that environment: writes a quantised GGUF file
``limits``      how much memory it gets, and what is tried at that
``process``     a process in a memory cgroup, asked in turns
``contestant``  runs there: answers prompts, with the time of every token
"""
