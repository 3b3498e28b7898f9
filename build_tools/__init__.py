"""What ``setup.py`` is made of: each module is one idea, and each has its tests in tests/packaging.

switches    the environment variables a person can set
toolchain   where torch, nvcc and the Python headers are
archs       which kernel libraries to build, and for which GPUs
jobs        how many compilers may run at once
extensions  the shared objects: sources, flags, links
measured    the compiler launcher that records seconds, memory and ptxas output of each object
progress    the progress line
ptxas       reading the output of ``ptxas -v``
report      ``_build_info.json`` and the table at the end of the build
"""
