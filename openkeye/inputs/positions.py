"""3-axis positions (M-RoPE): where every token of a prompt stands in time, height and width."""

import torch
from torch import Tensor


def position_ids(
    input_ids_T: Tensor,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int = 2,
) -> Tensor:
    """Positions [3, T] int64 (time, height, width) of a prompt.

    A text token takes the next number on all axes. The token at merged row r, column c of a picture's frame k takes
    (b + k, b + r, b + c), b being the next number at the picture's start; text goes on at b + max(t, rows, columns).
    Elapsed time never enters: it reaches the model as text. The grids hold one row (t, h, w) in patches per picture
    (per frame for videos), in the order of the prompt; None where there are none.
    """
    ids = input_ids_T.tolist()
    pictures = {
        image_token_id: _rows(image_grid_thw),
        video_token_id: _rows(video_grid_thw),
    }
    used = dict.fromkeys(pictures, 0)
    blocks: list[Tensor] = []
    index, text_start, next_position = 0, 0, 0
    while index < len(ids):
        token = ids[index]
        if token not in pictures:
            index += 1
            continue
        next_position = _append_text(blocks, index - text_start, next_position)
        assert used[token] < len(pictures[token]), f"pads of token {token} without a grid row at index {index}"
        num_times, rows, columns = pictures[token][used[token]]
        rows, columns = rows // spatial_merge_size, columns // spatial_merge_size
        used[token] += 1
        end = index + num_times * rows * columns
        assert ids[index:end] == [token] * (end - index), f"grid row asks for {end - index} pads at index {index}"
        axes = torch.meshgrid(torch.arange(num_times), torch.arange(rows), torch.arange(columns), indexing="ij")
        blocks.append(torch.stack([axis.reshape(-1) for axis in axes]) + next_position)
        next_position += max(num_times, rows, columns)
        index = text_start = end
    _append_text(blocks, len(ids) - text_start, next_position)
    for token, rows_of_token in pictures.items():
        assert used[token] == len(rows_of_token), f"{len(rows_of_token)} grid rows, {used[token]} runs of token {token}"
    return torch.cat(blocks, dim=1) if blocks else torch.zeros(3, 0, dtype=torch.int64)


def _rows(grid_thw: Tensor | None) -> list[list[int]]:
    return [] if grid_thw is None else grid_thw.tolist()


def _append_text(blocks: list[Tensor], num_tokens: int, next_position: int) -> int:
    """Add a run of text tokens; returns the position after it."""
    if num_tokens:
        blocks.append(torch.arange(next_position, next_position + num_tokens).expand(3, -1))
    return next_position + num_tokens
