"""The two halves in one process: what they hold, what crosses, and what comes out."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `qwen` is not installed")
pytest.importorskip("skimage", reason="the extra `qwen` is not installed")

from qwen_vl.cases import cases
from qwen_vl.halves import Embedded, LanguageHalf, Step, VisionHalf, Whole
from qwen_vl.handoff import pool_config
from qwen_vl.models import ModelSettings
from qwen_vl.prompts import Image, Preparation, Prompt, PromptError, Video, prompt_of
from qwen_vl.sizes import FAMILIES, SIZES, Family, size_of

COUNT = 12
PROMPTS = {**cases(shrink=8), "text alone": prompt_of("Hello.")}


class Models:
    """One model three ways; small enough to make for each test."""

    def __init__(self, family: Family) -> None:
        settings = ModelSettings(family, "tiny")
        self.settings = settings
        self.whole, self.vision = Whole(settings), VisionHalf(settings)
        self.language = LanguageHalf(settings)

    def embed(self, prompt: Prompt) -> Embedded:
        return self.vision(self.vision.prepare(prompt))

    def split(self, prompt: Prompt) -> list[Step]:
        return list(self.language.generate(self.embed(prompt), COUNT))


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> Models:
    return Models(request.param)


def picture(name: str = "one image") -> Image:
    part = next(part for part in PROMPTS[name].parts if isinstance(part, Image))
    assert isinstance(part, Image)
    return part


@pytest.mark.parametrize("name", PROMPTS)
def test_the_halves_give_the_whole_models_tokens_and_the_bits_of_its_logits(
    models: Models, name: str
) -> None:
    whole, split = models.whole.answer(PROMPTS[name], COUNT), models.split(PROMPTS[name])
    assert [step.token for step in split] == [step.token for step in whole]
    assert [step.digest for step in split] == [step.digest for step in whole]


def test_answers_depend_on_the_pictures(models: Models) -> None:
    answers = {
        tuple(step.token for step in models.split(prompt_of(picture(name), "What is it?")))
        for name in ("one image", "tall", "large")
    }
    assert len(answers) == 3


def test_one_row_that_arrives_wrong_changes_the_logits(models: Models) -> None:
    embedded = models.embed(PROMPTS["one image"])
    right = next(models.language.generate(embedded, 1))
    rows = embedded.fields["input_embeddings"].clone()
    rows[20] = rows[19]
    damaged = Embedded({**embedded.fields, "input_embeddings": rows}, embedded.delta)
    assert next(models.language.generate(damaged, 1)).digest != right.digest


def test_each_half_holds_its_part_and_only_the_text_table_is_on_both_sides(models: Models) -> None:
    whole = dict(models.whole.model.named_parameters())
    vision = {f"model.{name}": each for name, each in models.vision.model.named_parameters()}
    language = dict(models.language.model.named_parameters())
    assert vision.keys() | language.keys() == whole.keys()
    assert vision.keys() & language.keys() == {"model.language_model.embed_tokens.weight"}
    assert not [name for name in language if "visual" in name]
    for name, weights in (*vision.items(), *language.items()):
        assert torch.equal(weights, whole[name]), name
    on_meta = [name for name, each in (*vision.items(), *language.items()) if each.is_meta]
    assert not on_meta


def test_what_crosses_is_exactly_the_pools_fields(models: Models) -> None:
    embedded = models.embed(PROMPTS["video + image"])
    config = pool_config(models.settings)
    assert embedded.fields.keys() == {field.name for field in config.fields}
    count, hidden = embedded.num_tokens, models.settings.size.hidden
    assert embedded.fields["input_embeddings"].shape == (count, hidden)
    assert embedded.fields["mrope_positions"].shape == (3, count)
    assert embedded.fields["mrope_positions"].dtype == torch.int32
    last = int(embedded.fields["mrope_positions"].max())
    assert count + embedded.delta == last + 1
    has_deepstack = "deepstack_embeddings" in embedded.fields
    assert has_deepstack == (models.settings.family == "qwen3-vl")


def test_another_seed_is_another_model() -> None:
    one, other = (
        Whole(ModelSettings("qwen3-vl", "tiny", seed)).answer(PROMPTS["one image"], COUNT)
        for seed in (0, 1)
    )
    assert [step.token for step in one] != [step.token for step in other]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_of_one_picture_has_the_patches_of_that_picture(family: Family) -> None:
    prepare = Preparation(ModelSettings(family, "tiny"))
    still = prepare(prompt_of(picture()))
    video = prepare(prompt_of(Video((picture().data,) * 3)))
    rows = len(still["pixel_values"])
    assert video["video_grid_thw"][0].tolist() == [2, *still["image_grid_thw"][0, 1:].tolist()]
    for pair in range(2):
        patches = video["pixel_values_videos"][pair * rows : (pair + 1) * rows]
        assert torch.equal(patches, still["pixel_values"])


def test_the_second_frame_of_a_pair_is_the_second_half_of_its_patches() -> None:
    prepare = Preparation(ModelSettings("qwen2.5-vl", "tiny"))
    video = next(part for part in PROMPTS["video"].parts if isinstance(part, Video))
    first, second = video.frames[0], video.frames[-1]
    ahead, back = (
        prepare(prompt_of(Video(frames)))["pixel_values_videos"].unflatten(1, (3, 2, -1))
        for frames in ((first, second), (second, first))
    )
    assert torch.equal(ahead[:, :, 0], back[:, :, 1])
    assert not torch.equal(ahead[:, :, 0], ahead[:, :, 1])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (Image(b"no picture"), "cannot be read"),
        (Video(()), "at least one frame"),
        (Video((picture().data,), fps=0.0), "fps above 0"),
        (Video((picture().data, picture("wide").data)), "frames of one size"),
    ],
)
def test_a_prompt_that_cannot_be_used_says_why(part: Image | Video, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        Preparation(ModelSettings("qwen2.5-vl", "tiny"))(prompt_of(part))


def test_a_prompt_longer_than_the_pool_is_refused() -> None:
    with pytest.raises(PromptError, match="more than the pool's 1024"):
        Preparation(ModelSettings("qwen3-vl", "tiny"))(prompt_of("word " * 300))


def test_a_size_that_a_family_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="expected one of tiny, small, 3b, 7b, got '8b'"):
        size_of("qwen2.5-vl", "8b")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_resumes_what_is_longer_than_its_landing_allocation(family: Family) -> None:
    for size in SIZES[family].values():
        landing = size.landing_blocks * size.block_size
        assert landing < size.pool_tokens
        assert landing == 1024 or size is SIZES[family]["tiny"]
