"""How fast, how exact, how economical: ``python -m benchmarks --help`` lists the commands.

workloads.py  the real sizes that are measured, by name
common/       what the benchmarks share: commands, baselines, peers, accuracy, timing, floors
cpu/          the operator on a CPU
gpu/          everything on a CUDA device: build, tests, sanitizers, measurements
models/       whole models and their training
report/       the tables and figures of the pages, written from the records
results/      the committed records, a folder for each machine
"""
