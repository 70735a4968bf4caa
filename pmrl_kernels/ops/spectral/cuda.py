"""The spectral op of the compiled library for CUDA (csrc/cuda/spectral.cpp): the same operators as for CPUs, for
tensors of another device. Other numbers of modalities than its kernels are compiled for are the next backend's."""

from .. import cuda
from . import native, spec

PAIRS = {
    spec.SPECTRAL.name: native.PAIRS[spec.SPECTRAL.name]._replace(backend=cuda.NAME, rejects=cuda.rejects_modalities),
}
