// The inner loops of decoding on a CPU. Plain C with OpenMP; built and called by `__init__.py` beside this file.
#include "vector.h"
#include "linear.h"
#include "rowwise.h"
#include "attention.h"
#include "layer.h"
#include "sampling.h"
