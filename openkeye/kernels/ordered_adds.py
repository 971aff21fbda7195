"""Sums over tiles of queries into the rows of their keys, with the same bits on every run, in Triton.

Tiles that add to shared rows as they finish round in a different order each time. Here every tile stores its parts in rows of
its own, and whoever owns a stretch of keys adds them tile after tile. Letters as in `unions`; G groups, D width, R rounds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.unions import Unions

SLAB_BYTES = 1 << 30
# of parts that are kept at a time
OWNED_KEYS = 512
# whose parts one program adds up


class OrderedAdds:
    """The parts of as many tiles as a slab holds, added in the tiles' order, and so on, without asking the device.

    How many tiles a slab holds is known on the device only: the parts of all tiles are laid end to end, and a round takes those
    that begin in its stretch. There are as many rounds as full unions would need; those past the last part end at once.

    A kernel of round r stores the part of a tile's n-th key at row `first_rows[tile] - first_row + n` of `parts`, if
    `first_rows[tile]` lies in `first_row .. first_row + num_rows`, and does nothing otherwise.
    """

    def __init__(
        self, unions: Unions, shape: torch.Size, num_tensors: int, num_programs: int, slab_bytes: int = SLAB_BYTES
    ) -> None:
        """Sums of the shape [S, G, D]; each of num_tensors has one part for each of num_programs (a multiple of G) and key."""
        num_tiles, room = unions.keys_NU.shape
        self.unions, self.num_programs = unions, num_programs
        self.num_keys, self.num_groups, self.width = shape
        device = unions.counts_N.device
        self.num_rows = max(1, slab_bytes // (num_tensors * num_programs * self.width * 4) - room)
        rows = min(self.num_rows, num_tiles * room) + room
        self.parts = torch.empty(num_tensors, rows, num_programs, self.width, dtype=torch.float32, device=device)
        self.first_rows = unions.counts_N.long().cumsum(0) - unions.counts_N
        self.first_rows_of_rounds = range(0, max(0, num_tiles - 1) * room + 1, self.num_rows)
        bounds = torch.arange(len(self.first_rows_of_rounds) + 1, device=device) * self.num_rows
        self.first_tiles_R = torch.searchsorted(self.first_rows, bounds)
        self.num_blocks = triton.cdiv(self.num_keys, OWNED_KEYS)
        self.cuts = torch.empty(num_tiles, self.num_blocks + 1, dtype=torch.int32, device=device)
        _cut[(num_tiles, triton.cdiv(self.num_blocks + 1, 128))](
            unions.keys_NU, unions.counts_N, self.cuts, room, self.num_blocks, OWNED_KEYS=OWNED_KEYS, BLOCK=128, num_warps=4
        )

    def add(self, first_row: int, sums: tuple[Tensor, ...]) -> None:
        """Add the parts of the round that begins at first_row to the sums, float32 [S, G, D] each."""
        for number, sum_SGD in enumerate(sums):
            _add_parts[(self.num_blocks, self.num_groups)](
                self.parts[number],
                self.unions.keys_NU,
                self.cuts,
                self.first_rows,
                self.first_tiles_R[first_row // self.num_rows :],
                sum_SGD,
                first_row,
                self.unions.keys_NU.shape[1],
                self.num_blocks,
                GROUPS=self.num_groups,
                PROGRAMS_PER_GROUP=self.num_programs // self.num_groups,
                WIDTH=self.width,
                BLOCK=32,
                num_warps=4,
            )


@triton.jit
def _cut(union_keys, union_counts, cuts, room, num_blocks, OWNED_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Where each stretch of OWNED_KEYS keys begins in a tile's union, by halving; the last cut is the union's end."""
    tile = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = union_keys + tile * room
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + tl.load(union_counts + tile)
    for _ in range(32):
        middle = (low + high) // 2
        is_open = low < high
        is_before = tl.load(line + middle, mask=is_open, other=0) < block * OWNED_KEYS
        high = tl.where(is_open & (is_before == 0), middle, high)
        low = tl.where(is_open & is_before, middle + 1, low)
    tl.store(cuts + tile * (num_blocks + 1) + block, low, mask=block <= num_blocks)


@triton.jit
def _add_parts(
    parts,
    union_keys,
    cuts,
    first_rows,
    first_tiles,
    sums,
    first_row,
    room,
    num_blocks,
    GROUPS: tl.constexpr,
    PROGRAMS_PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts of a round to the keys that this program owns, tile after tile: nobody else touches these keys."""
    block, group = tl.program_id(0), tl.program_id(1)
    num_programs: tl.constexpr = GROUPS * PROGRAMS_PER_GROUP
    dim = tl.arange(0, WIDTH)
    for tile in range(tl.load(first_tiles), tl.load(first_tiles + 1)):
        cut = cuts + tile * (num_blocks + 1) + block
        begin, end = tl.load(cut), tl.load(cut + 1)
        part_row = tl.load(first_rows + tile) - first_row
        for start in range(begin, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            is_key = column < end
            key = tl.load(union_keys + tile * room + column, mask=is_key, other=0).to(tl.int64)
            place_ND = (key * GROUPS + group)[:, None] * WIDTH + dim[None, :]
            sum_ND = tl.load(sums + place_ND, mask=is_key[:, None], other=0.0)
            for number in tl.static_range(PROGRAMS_PER_GROUP):
                place = ((part_row + column) * num_programs + group * PROGRAMS_PER_GROUP + number)[:, None] * WIDTH
                sum_ND += tl.load(parts + place + dim[None, :], mask=is_key[:, None], other=0.0)
            tl.store(sums + place_ND, sum_ND, mask=is_key[:, None])
        # The next tile's row of the same key may fall to another thread.
        tl.debug_barrier()
