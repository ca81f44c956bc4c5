"""Which instruction sets this machine has."""

from seqkernels import _kernels

INSTRUCTION_SETS = _kernels.supported_isas()
