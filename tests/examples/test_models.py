"""The examples' models and prompts: what a real engine's would do, on small numbers."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from _models import LanguageConfig, LanguageModel, VisionConfig, VisionTransformer, to_patches
from _photos import PHOTOS, mrope, prompt_about

VISION = VisionConfig(width=64, heads=4, mlp=128, out=128)
LANGUAGE = LanguageConfig(hidden=128, heads=2, kv_heads=1, head=32, mlp=128, vocab=512)


def test_text_counts_alike_on_all_axes_and_an_image_by_row_and_column() -> None:
    positions, delta = mrope(rows=2, columns=3, before=1, after=2)
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]
    # The next token is number 9 and stands at position 6.
    assert 9 + delta == 6


def test_the_four_patches_of_a_token_are_neighbours() -> None:
    image = torch.arange(3 * 56 * 84, dtype=torch.float32).reshape(3, 56, 84)
    patches, grid = to_patches(image, VISION)
    assert grid[:8].tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3],
    ]  # fmt: skip
    for patch, (row, column) in zip(patches, grid.tolist(), strict=True):
        rows, columns = (slice(14 * index, 14 * index + 14) for index in (row, column))
        assert torch.equal(patch, image[:, rows, columns].flatten())


def test_a_picture_gives_one_embedding_for_each_28_pixels_squared() -> None:
    model = VisionTransformer.seeded(VISION, seed=1)
    assert model(torch.zeros(3, 84, 140)).shape == (15, VISION.out)


def test_the_same_seed_gives_the_same_model() -> None:
    image = torch.rand(3, 56, 56)
    one, same, other = (VisionTransformer.seeded(VISION, seed)(image) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_generating_step_by_step_is_reading_all_at_once() -> None:
    """The cache, the causal mask and the positions after the prompt agree with each other."""
    model = LanguageModel.seeded(LANGUAGE, seed=1)
    prompt = prompt_about(torch.randn(6, LANGUAGE.hidden), 2, 3, model.table)
    embeddings, delta = prompt.input_embeddings, prompt.mrope_position_delta
    tokens = model.generate(embeddings, prompt.mrope_positions, delta, 5)
    longer = torch.cat([embeddings, model.table[tokens[:4]]])
    after = torch.arange(len(embeddings), len(longer)) + delta
    positions = torch.cat([prompt.mrope_positions, after.expand(3, -1)], dim=1)
    assert model.generate(longer, positions, delta, 1) == tokens[4:]


def test_what_comes_later_changes_nothing_before_it() -> None:
    model = LanguageModel.seeded(LANGUAGE, seed=1)
    prompt = torch.randn(8, LANGUAGE.hidden)
    positions = torch.arange(8).expand(3, -1)
    angles = model._angles(positions)
    whole = model.layers[0](prompt, angles, [])
    part = model.layers[0](prompt[:5], angles[:5], [])
    assert_close(whole[:5], part, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("photo", PHOTOS, ids=str)
def test_every_photograph_is_cut_to_whole_tokens_at_either_size(photo: object) -> None:
    from _photos import Photo, load

    pytest.importorskip("PIL", reason="the extra `examples` is not installed")
    pytest.importorskip("skimage", reason="the extra `examples` is not installed")
    assert isinstance(photo, Photo)
    for cut in (photo, photo.shrunk(by=4)):
        image = load(cut)
        assert image.shape == (3, cut.height, cut.width)
        assert cut.height % 28 == cut.width % 28 == 0
        assert image.std() > 0.1
