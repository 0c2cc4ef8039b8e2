"""The tests, a folder for each subject; each file's first line says what it holds.

    operator      what the operator computes, on every device, and how PyTorch sees it
    cuda          the CUDA kernels on a CPU and on a GPU, their machine code and memory accesses
    integrations  models and runtimes of others that call the operator
    detector      the detector of examples/deformable_detr
    plot          pictures and pages of msda.plot
    packaging     building, installing, releasing, and what the documents say
    benchmarks    the programs that measure
    fuzz          random problems and hostile calls, under sanitizers too
    helpers       inputs, calls and comparisons that several folders share

Files called conftest.py hold fixtures and hooks; nobody imports them. `make test SUBJECT=operator`
runs one folder, `make test MARK=executor` what runs the CUDA kernels on the CPU.
"""
