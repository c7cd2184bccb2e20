"""The patch tower: what it makes of a picture, by its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_cases import VIDEO, tiny_model

from slowfast_model.vision import PatchTower, encode_frames

WIDTH, GRID, PATCH = 12, 4, 2
SIDE = GRID * PATCH  # of a picture that needs no resizing


@pytest.fixture
def tower() -> PatchTower:
    """Every part awake: new norms would be the identity, and new position embeddings small."""
    torch.manual_seed(5)
    tower = PatchTower(WIDTH, grid=GRID, patch=PATCH)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.5)
    return tower


def pictures(rng, side: int = SIDE, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=rng())


@torch.no_grad()
def test_features_are_normalised_patches_with_a_position_through_a_residual_mlp(tower, rng):
    frames = pictures(rng)
    weights = {name: x.double() for name, x in tower.named_parameters()}
    pixels = frames.double().permute(0, 3, 1, 2) / 255 * 2 - 1  # -1 to 1
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)  # [T, grid * grid, 3 * patch * patch], row by row
    x = patches @ weights["embed.weight"].flatten(1).T + weights["embed.bias"] + weights["position"]
    h = F.layer_norm(x, (WIDTH,), weights["mlp.0.weight"], weights["mlp.0.bias"])
    h = (
        F.gelu(h @ weights["mlp.1.weight"].T + weights["mlp.1.bias"]) @ weights["mlp.3.weight"].T
        + weights["mlp.3.bias"]
    )
    expected = F.layer_norm(x + h, (WIDTH,), weights["norm.weight"], weights["norm.bias"])
    torch.testing.assert_close(encode_frames(tower, frames), expected.float(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_larger_picture_is_averaged_into_a_smaller_one(tower):
    """Of 0, 255, 255, 0 in turn nothing but grey is left, wherever one might look for a single pixel."""
    stripes = torch.tensor([0, 255, 255, 0], dtype=torch.uint8).repeat(SIDE)
    striped = stripes[None, None, :, None].expand(1, 4 * SIDE, 4 * SIDE, 3)
    inner = slice(1, GRID - 1)  # at the border the average has one side alone
    found, grey = (
        tower(picture.permute(0, 3, 1, 2).float() / 255).unflatten(1, (GRID, GRID))[:, :, inner]
        for picture in (striped, torch.full((1, SIDE, SIDE, 3), 127.5))
    )
    torch.testing.assert_close(found, grey, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_smaller_picture_is_interpolated(tower):
    ramp = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(1, 3, 4, 4)
    between = torch.tensor([0, 0.25, 0.75, 0.75, 0.25, 0.25, 0.75, 1]).expand(1, 3, SIDE, SIDE)
    torch.testing.assert_close(tower(ramp), tower(between), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_picture_of_any_shape_gives_features_that_the_model_takes(tower, rng):
    frames = torch.randint(0, 256, (5, 20, 30, 3), dtype=torch.uint8, generator=rng())
    clip = encode_frames(tower, frames, chunk=2)
    assert clip.shape == (5, GRID * GRID, WIDTH)
    torch.testing.assert_close(clip, encode_frames(tower, frames))
    assert tiny_model()(torch.tensor([[1, VIDEO, 2]]), [clip]).logits.isfinite().all()


@torch.no_grad()
def test_a_tower_makes_its_own_pixels_of_whole_levels_where_it_has_a_way_to(tower, rng):
    frames = torch.randint(0, 256, (3, 20, 30, 3), dtype=torch.uint8, generator=rng())
    seen = []

    def preprocess(part):
        seen.append(part)
        return (255 - part.permute(0, 3, 1, 2).float()) / 255

    want = encode_frames(tower, 255 - frames)
    tower.preprocess = preprocess
    torch.testing.assert_close(encode_frames(tower, frames, chunk=2), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat(seen), frames)


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (torch.zeros(5, 8, 8, dtype=torch.uint8), ValueError),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), ValueError),
        (torch.zeros(5, 8, 8, 3), TypeError),
    ],
)
def test_frames_that_do_not_fit_are_refused(frames, error):
    with pytest.raises(error, match="frames"):
        encode_frames(PatchTower(WIDTH), frames)
