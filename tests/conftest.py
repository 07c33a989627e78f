"""Settings shared by all tests."""

import torch

# The models here are tiny: a second thread only waits, and spins while it does.
torch.set_num_threads(1)
