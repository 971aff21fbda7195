"""One way in which a Triton kernel is compiled, for `compile_kernels.py`."""

from dataclasses import dataclass
from typing import Any

from triton.runtime import JITFunction


@dataclass(frozen=True)
class Variant:
    """A kernel with what a launch tells the compiler."""

    kernel: JITFunction
    pointers: dict[str, str]
    # what each tensor holds, by argument
    constants: dict[str, Any]
    options: dict[str, Any]
    # launch options

    def __repr__(self) -> str:
        return f"{self.kernel.__name__} {self.arguments()} {self.options}"

    def arguments(self) -> dict[str, Any]:
        """Pointers and constants of those arguments that the kernel has."""
        given = self.pointers | self.constants
        return {name: given[name] for name in self.kernel.arg_names if name in given}


def make(
    kernel: JITFunction, pointers: dict[str, str], constants: dict[str, Any], num_warps: int = 4, **options: Any
) -> Variant:
    """A variant from what several kernels share: arguments that this one has not are left out."""
    own = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return Variant(kernel, pointers, own, {"num_warps": num_warps} | options)
