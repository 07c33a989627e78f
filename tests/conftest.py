"""One torch thread: the models here are tiny, and waiting threads only take the cores from each other."""

import os

import pytest
import torch

from lda_service.engine import native, prepack

torch.set_num_threads(1)
# `lda` remembers what people ask, not what tests do.
os.environ.setdefault("LDA_NO_LOG", "1")
# What is faster on this machine is for a server to find out; tests run the same code everywhere.
prepack.has_bf16_products = lambda: False


@pytest.fixture(params=["native", "torch"])
def kernels(request):
    """The native kernels, and None, which stands for torch's operators."""
    if request.param == "torch":
        return None
    try:
        return native.load()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
