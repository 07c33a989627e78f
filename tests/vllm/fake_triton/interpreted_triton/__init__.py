"""A backend "cpu" for Triton, so that vLLM's V2 model runner starts on a machine without a GPU. For tests only.

It compiles nothing: with TRITON_INTERPRET=1 kernels run in Triton's interpreter, and without it they fail. Put the
folder above on PYTHONPATH; the dist-info beside this package has the entry point by which Triton finds it.
"""
