import numpy as np
import torch

from openkeye.inputs.patches import join_patches, patches_from_pixels


def test_every_patch_holds_its_own_pixels_normalised_row_by_row():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 56, 84, 3), dtype=np.uint8)
    patches = patches_from_pixels(pixels)
    assert patches.grid_thw.tolist() == [[1, 4, 6]] * 3
    assert patches.pixels.dtype == torch.float32
    for picture, row, column in ((0, 0, 0), (1, 2, 5), (2, 3, 1)):
        square = pixels[picture, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14].transpose(2, 0, 1)
        expected = torch.from_numpy(square.astype(np.float32)) / 127.5 - 1
        torch.testing.assert_close(patches.pixels[picture * 24 + row * 6 + column], expected)
    assert float(patches.pixels.min()) >= -1 and float(patches.pixels.max()) <= 1


def test_float_pixels_on_a_tensor_give_the_same_patches():
    pixels = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
    torch.testing.assert_close(patches_from_pixels(pixels).pixels, patches_from_pixels(pixels.float()).pixels)


def test_pictures_of_different_sizes_are_joined_in_order():
    small, large = (patches_from_pixels(np.full((1, side, side, 3), side, np.uint8)) for side in (28, 56))
    joined = join_patches([small, large])
    assert joined.grid_thw.tolist() == [[1, 2, 2], [1, 4, 4]]
    assert torch.equal(joined.slice_pictures(1, 2).pixels, large.pixels)
    assert join_patches([]) is None
