"""Text with a cache is the text without one, for every kind of positions, cache and batch."""

from __future__ import annotations

import pytest
import torch

from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.checkpoints.pretrained import load_pretrained_
from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.evaluation.cached import continued, recomputed
from mqat.evaluation.generation import Limits, generate, prompt_tokens
from mqat.evaluation.sampling import Sampling
from mqat.evaluation.text_model import ExportedText, MegatronText
from mqat.export.export import export_trtllm
from mqat.specs.model import build_model
from mqat.specs.policy import Policy
from mqat.verify.verify import open_export
from tests.unit.checkpoints.test_positions import LIMIT, transformers_model
from tests.unit.model_fixtures import MODEL, microbatches, switch_off

PROMPTS = [[5, 9, 3, 20, 41, 7, 8, 2, 60, 11], [12], [7, 30, 1, 2, 3]]
NAMES = ("longrope, short", "window from a layer on", "gemma 2", "gemma 3")


class Letters:
    """A token is a letter; 0 ends a text."""

    eos_token_id = 0
    chat_template = None

    def decode(self, tokens, skip_special_tokens=True):
        end = "" if skip_special_tokens else "<end>"
        return "".join(end if not t else chr(96 + t) if t < 27 else "?" for t in tokens)


@pytest.fixture
def built(world, tmp_path):
    def build(name, **settings):
        model = transformers_model(name, **settings)
        model.save_pretrained(tmp_path / "model")
        source = HuggingFaceCheckpoint(tmp_path / "model")
        chunks = build_model(source.config, ModelConfig(), {}, torch.float32)
        load_pretrained_(chunks, source)
        return model, chunks

    return build


def passes(step, prompts, count):
    """Logits [count, b, V] of greedy passes; the second row waits in every third one: NaN."""
    following, found = [list(prompt) for prompt in prompts], []
    for n in range(count):
        waits = n % 3 == 2
        logits = step([[] if waits and row == 1 else new for row, new in enumerate(following)])
        for row, best in enumerate(logits.argmax(-1).tolist()):
            if not (waits and row == 1):
                following[row] = [best]
        if waits:
            logits[1] = torch.nan
        found.append(logits)
    return torch.stack(found)


def difference(a, b):
    """Largest, where rows did not wait."""
    assert torch.equal(a.isnan(), b.isnan()) and a.isnan().any()
    return float((a - b).nan_to_num().abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_passes_with_a_cache_are_those_without(built, name):
    _, chunks = built(name)
    with continued(chunks, 3, 30) as (step, _):
        found = passes(step, PROMPTS, 9)
    with recomputed(chunks, 3) as step:
        expected = passes(step, PROMPTS, 9)
    assert difference(found, expected) < LIMIT
    assert difference(found[3:], expected[:-3]) > LIMIT  # control


def test_a_sequence_that_outgrows_short_frequencies_is_rotated_anew(built):
    _, chunks = built("longrope, long")
    prompts = [list(range(1, 29)), [4, 5], list(range(40, 80))]  # 32 is where it turns otherwise
    with recomputed(chunks, 3) as step:
        expected = passes(step, prompts, 9)
    with continued(chunks, 3, 60) as (step, _):
        found = passes(step, prompts, 9)
    assert difference(found, expected) < LIMIT
    with continued(chunks, 3, 60) as (step, _):
        step.short = None  # control: keys of the short sequence stay
        kept = passes(step, prompts, 9)
    assert (kept - expected)[6:, 0].abs().max() > LIMIT


def test_greedy_text_is_that_of_transformers(built):
    model, chunks = built("llama3")
    text = MegatronText(chunks, Letters())
    answers, speed = generate(text, PROMPTS, Limits(12, ignores_end=True), batch_size=2)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        given = torch.tensor([prompt])
        expected = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert answer.tokens == expected[0, len(prompt) :].tolist()
    assert (speed.prompt_tokens, speed.decode_tokens) == (16, 3 * 11)


def test_learned_positions_and_biases_give_the_text_of_transformers(world, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=40, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    source = HuggingFaceCheckpoint(tmp_path)
    chunks = build_model(source.config, ModelConfig(), {}, torch.float32)
    load_pretrained_(chunks, source)
    limits = Limits(12, ignores_end=True)
    answers, _ = generate(MegatronText(chunks, Letters()), PROMPTS, limits)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        given = torch.tensor([prompt])
        expected = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        assert answer.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_quantized_cache_holds_codes_and_gives_the_same_text(world, tiny_cache, name):
    chunks = tiny_cache(name)
    prompts = [[5, 9, 3, 20, 41, 7], [12, 4]]
    with continued(chunks, 2, 20) as (step, caches):
        found = passes(step, prompts, 6)
        held = {store.held.dtype for cache in caches for store in (cache.key, cache.value)}
        used = sum(store.num_bytes for cache in caches for store in (cache.key, cache.value))
    with recomputed(chunks, 2) as step:
        expected = passes(step, prompts, 6)
    assert difference(found, expected) < LIMIT
    assert held == {torch.uint8} and used == 2 * 2 * 2 * 21 * 2 * 32  # a byte an element
    switch_off(chunks)
    with continued(chunks, 2, 20) as (step, caches):
        plain = passes(step, prompts, 6)
        assert caches[0].key.held.dtype == torch.float32
    assert difference(plain, expected) > LIMIT  # control: it was quantized


@pytest.fixture
def tiny_cache(world):
    def build(name):
        from mqat.calibration.calibrate import calibrate
        from mqat.evaluation.forward import run_layers

        layers = Policy("null", kv_cache=name).schemes(MODEL)
        chunks = build_model(MODEL, ModelConfig(), layers, torch.float32)
        load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.2))
        group = torch.distributed.group.WORLD
        calibrate(chunks, lambda: run_layers(chunks, [microbatches()]), group=group)
        return chunks

    return build


def test_exports_are_continued_by_their_reader(tiny, tmp_path):
    export_trtllm(tiny("int8"), tmp_path / "out", tensor_parallel=2, dtype="float32")
    model = ExportedText(open_export(tmp_path / "out", keeps_weights=True), Letters())
    texts = [
        [answer.tokens for answer in generate(model, PROMPTS, limits, cached=cached)[0]]
        for cached in (True, False)
        for limits in [Limits(8, ignores_end=True)]
    ]
    assert texts[0] == texts[1] and len(set(map(str, texts[0]))) == 3


class Counting:
    """A model that counts: 26 letters, each after the one before; then 0."""

    def __init__(self, longest=40):
        self.tokenizer, self.longest = Letters(), longest
        self.ends, self.share = frozenset({0}), (0, 1)

    def continued(self, count, capacity, *, cached):
        from contextlib import contextmanager

        @contextmanager
        def opened():
            last = [0] * count

            def step(new):
                for row, tokens in enumerate(new):
                    last[row] = tokens[-1] if tokens else last[row]
                following = torch.tensor([(n + 1) % 27 for n in last])
                return 5.0 * torch.nn.functional.one_hot(following, 27).float()

            yield step

        return opened()


def test_texts_end_at_end_tokens_stop_strings_and_limits():
    prompts = [[20], [1], [3], [9]]
    (end, stopped, most, cut), _ = generate(Counting(), prompts, Limits(12, ("fg", "gh")))
    assert (end.text, end.ended_by, end.tokens[-1]) == ("uvwxyz", "end token", 0)
    assert (stopped.text, stopped.ended_by, stopped.stop) == ("bcde", "stop", "fg")
    assert (most.text, most.stop) == ("de", "fg")
    assert (cut.text, cut.ended_by, cut.stop) == ("jklmnopqrstu", "max_tokens", None)
    (longest,), _ = generate(Counting(longest=5), [[3, 4]], Limits(12))
    assert (longest.text, longest.ended_by) == ("efg", "max_position_embeddings")


def test_a_special_token_ends_a_text_as_a_stop_string():
    limits = Limits(12, ("<end>",), ignores_end=True)
    (answer,), _ = generate(Counting(), [[20]], limits)
    assert (answer.text, answer.ended_by, answer.stop) == ("uvwxyz", "stop", "<end>")
    (answer,), _ = generate(Counting(), [[20]], Limits(12, ignores_end=True))
    assert answer.text == "uvwxyzabcde"  # control


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 2 is empty"), ([[1] * 40], "prompt 1 has 40 tokens")],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, message):
    with pytest.raises(UserError, match=message):
        generate(Counting(), prompts, Limits(4))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=2)])
def test_logits_that_are_not_numbers_choose_nothing(sampling):
    logits = torch.tensor([0.0, 1.0, 2.0])
    assert sampling.choose(logits, sampling.generator(0)) in range(3)  # control
    logits[0] = float("nan")
    with pytest.raises(UserError, match="logits are NaN"):
        sampling.choose(logits, sampling.generator(0))


def test_samples_depend_on_seed_and_number_and_not_on_batches():
    prompts = [[n] for n in range(1, 8)]

    def texts(seed, **options):
        sampling = Sampling(temperature=8.0, seed=seed)
        return [
            a.text
            for a in generate(Counting(), prompts, Limits(9), sampling=sampling, **options)[0]
        ]

    assert texts(1) == texts(1, batch_size=2) == texts(1, batch_size=1)
    assert texts(1) != texts(2) and len(set(texts(1))) == 7


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([2.0, 1.0, 0.0, 1.0, -1.0])

    def shares(sampling):
        generator = sampling.generator(0)
        drawn = torch.tensor([sampling.choose(logits, generator) for _ in range(2000)])
        return torch.bincount(drawn, minlength=5) / 2000

    expected = (logits / 0.7).softmax(0)
    assert (shares(Sampling(0.7)) - expected).abs().max() < 0.04
    assert (shares(Sampling(1.0)) - expected).abs().max() > 0.04  # control
    assert (shares(Sampling(1.0, top_k=1)) == torch.tensor([1.0, 0, 0, 0, 0])).all()
    two = torch.tensor([2.0, 1.0, -torch.inf, 1.0, -torch.inf]).softmax(0)  # equal ones stay
    assert (shares(Sampling(1.0, top_k=2)) - two).abs().max() < 0.04
    likely = torch.tensor([2.0, 1.0, -torch.inf, -torch.inf, -torch.inf]).softmax(0)
    assert (shares(Sampling(1.0, top_p=0.7)) - likely).abs().max() < 0.04


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1"), ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0"), ({"top_k": 5}, "with temperature 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


def test_a_chat_without_template_and_a_lonely_system_message_are_refused():
    with pytest.raises(UserError, match="no chat template"):
        prompt_tokens(Letters(), "a", chat=True)
    with pytest.raises(UserError, match="--chat"):
        prompt_tokens(Letters(), "a", system="b")


def test_attention_that_keeps_nothing_is_refused(built):
    _, chunks = built("llama3")
    chunks[0].config.apply_rope_fusion = True
    with pytest.raises(UserError, match="apply_rope_fusion=True"), continued(chunks, 1, 4):
        pass
    chunks[0].config.apply_rope_fusion = False
    chunks[0].decoder.layers[0].self_attention.core_attention = torch.nn.Identity()
    with pytest.raises(UserError, match="Identity keeps no keys"), continued(chunks, 1, 4):
        pass
