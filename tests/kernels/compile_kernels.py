"""Compiles every Triton kernel for one GPU architecture, which needs no GPU: python compile_kernels.py 80

Prints one line a kernel: its name and its bytes of shared memory. The interpreter runs what no compiler accepts, so this is the
other half of testing kernels on a machine without a GPU. What is compiled is listed in `variants_answering.py` and
`variants_learning.py`.
"""

import functools
import multiprocessing
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels import variants_answering, variants_learning
from tests.kernels.variant import Variant

POINTERS = {"u8": "*u8", "e4m3": "*fp8e4nv", "bf16": "*bf16", "f32": "*fp32", "i32": "*i32", "i64": "*i64"}
FLOATS = {"scale", "scale_log2", "eps", "factor"}


@functools.cache
def variants(capability: int) -> list[Variant]:
    """All of them, none twice."""
    listed = variants_answering.variants(capability) + variants_learning.variants(capability)
    return list({repr(variant): variant for variant in listed}.values())


def compile_variant(capability: int, place: int) -> str:
    """The line to print of one variant, told by its place: a kernel itself cannot go from process to process."""
    variant = variants(capability)[place]
    names = variant.kernel.arg_names
    signature = {name: POINTERS[variant.pointers[name]] if name in variant.pointers else "i32" for name in names}
    signature |= dict.fromkeys(FLOATS & set(names), "fp32")
    signature |= dict.fromkeys(variant.constants, "constexpr")
    # As at run time for tensors and strides of whole 16 bytes: only such loads are pipelined, through shared memory.
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name][0] in "*i"}
    source = ASTSource(variant.kernel, signature, variant.constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    return f"{variant.kernel.__name__} {compiled.metadata.shared} bytes of shared memory: {variant.constants} {variant.options}"


def main() -> None:
    capability = int(sys.argv[1])
    with multiprocessing.get_context("fork").Pool() as pool:
        for line in pool.imap(functools.partial(compile_variant, capability), range(len(variants(capability)))):
            print(line, flush=True)


if __name__ == "__main__":
    main()
