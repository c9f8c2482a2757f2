"""The laws the code obeys: the method, in the order of cadft.py; the loop; bad input; evaluation."""
import collections
import concurrent.futures
import itertools
import json
import math
import os
import random
import re
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

import cadft
import evaluate
import train

train.quiet()
warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # no ini file to register marks in
LONG = pytest.mark.long, pytest.mark.skipif("long" not in sys.argv, reason="run by: pytest -m long")
HERE = Path(__file__).parent
ARCHITECTURES = pytest.mark.parametrize("architecture", ("llama", "qwen2", "qwen3", "gpt2", "gemma2"))
CHAT = ("{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}#{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}")
IMAGE = 2       # a placeholder's id, which has_plain_head tries too; an image is four of them


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


def tiny(architecture="llama", **more):
    size = dict(vocab_size=47, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=128,
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    size |= {} if architecture == "gpt2" else dict(head_dim=16, num_key_value_heads=1)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **size | more)
    return transformers.AutoModelForCausalLM.from_config(config)


def folder(path, lm=None, tokenizer=None, **more):
    (lm or tiny()).save_pretrained(path, **more)
    (tokenizer or characters()).save_pretrained(path)
    return str(path)


def rows(seed=0):
    """Demonstrations of which every third is noise that a model can't learn."""
    draw = random.Random(seed)
    noise = lambda: "".join(draw.choices("klmnopqrstuvwxyz", k=draw.randint(4, 9)))
    return [{"prompt": f"{i}+{i}"} | ({"response": "ab", "kind": "ab"} if i % 3 else
                                       {"response": noise(), "kind": "noise"}) for i in range(24)]


def jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def some_batch(lengths=((3, 4), (1, 9), (8, 1)), pad=0, side="right", seed=0):
    """input_ids, attention_mask, labels of random rows with these prompt and response lengths."""
    draw, rows = random.Random(seed), []
    for prompt, response in lengths:
        ids = [draw.randrange(3, 40) for _ in range(prompt + response)]
        rows.append(torch.tensor([ids, [1] * len(ids), [-100] * prompt + ids[prompt:]]))
    return [torch.nn.utils.rnn.pad_sequence(part, True, fill, padding_side=side)
            for part, fill in zip(zip(*rows), (pad, 0, -100))]


def naive_nll(lm, ids, labels, **more):
    """-log p of the response tokens of each row, from the logits of the model itself: B tensors [|y|]."""
    log_p, mask = lm(input_ids=ids, **more).logits[:, :-1].log_softmax(-1), labels[:, 1:] != -100
    nll = -log_p[mask].gather(1, labels[:, 1:][mask][:, None])[:, 0]
    return nll.split(mask.sum(1).tolist())


# ==== The method ===========================================================================================

@ARCHITECTURES
def test_nll_is_that_of_softmax_and_gather_gradients_too(architecture):
    lm, (ids, seen, labels) = tiny(architecture).double().eval(), some_batch()
    own = torch.cat(naive_nll(lm, ids, labels, attention_mask=seen))
    expected = torch.autograd.grad(own.square().sum(), list(lm.parameters()))
    for chunk in 1, 3, 512:
        nll, mask = cadft.token_nll(lm, ids, seen, labels, chunk)
        assert torch.equal(mask, labels[:, 1:] != -100) and (nll[~mask] == 0).all()
        assert_close(nll[mask], own)
        assert_close(torch.autograd.grad(nll.square().sum(), list(lm.parameters())), expected)
    others = [some_batch(pad=2), (ids, None, labels)]          # pad = eos, as many tokenizers have it
    if architecture not in ("gpt2", "gemma2"):                 # positions are absolute; left padding is nan
        others.append(some_batch(pad=2, side="left"))
    for other in others:
        there, where = cadft.token_nll(lm, *other)
        assert_close(there[where], own)
    assert cadft.token_nll(lm.bfloat16(), ids, seen, labels)[0].dtype == torch.float32


def test_no_tensor_of_either_pass_grows_with_vocabulary_times_tokens():
    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))
            return out
    sizes, kept, lm, batch = [], [], tiny(vocab_size=5000, hidden_size=2), some_batch([(3, 60)] * 4)
    cadft.has_plain_head(lm)                                       # looks at whole logits, of 8 tokens, once
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
    assert not any(map(cadft.has_plain_head, altered))
    plain = tiny("gemma2", final_logit_softcapping=None), *map(tiny, ("llama", "qwen2", "qwen3", "gpt2"))
    assert all(map(cadft.has_plain_head, plain))


def test_scores_and_losses_by_hand_their_gradients_and_a_row_without_response_is_named():
    """DFT: d loss / d log p = -p. Without the stop-gradient, -p (1 + log p): for p < 1/e, p would fall."""
    p = torch.tensor([[0.9, 0.3, 1e-6], [0.1, math.nan, math.nan]], dtype=torch.float64)
    mask, count = ~p.isnan(), torch.tensor([3, 1])             # nan: outside of the response
    log_p = p.log().requires_grad_()
    one = torch.ones_like(p)
    focal = -2 * (1 - p) * p * p.log() + (1 - p) ** 2          # -d loss / d log p of a token
    for function, factor, slope in ((cadft.compatibility, one, None), (cadft.sft_loss, one, one),
                                    (cadft.dft_loss, p, p), (cadft.focal_loss, (1 - p) ** 2, focal)):
        found = function(-log_p, mask)
        assert_close(found, -(factor * p.log()).nansum(1) / count)
        assert found.requires_grad == (slope is not None)
        if found.requires_grad:
            slopes, = torch.autograd.grad(found.sum(), log_p)
            assert_close(-slopes[mask], (slope / count[:, None])[mask])
        with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
            function(torch.ones(3, 4), torch.tensor([[True] * 4, [False] * 4, [True] * 4]))


def test_zscore_is_the_textbooks_over_all_ranks_and_equal_scores_have_c_hat_0_and_w_1_exactly(monkeypatch):
    scores = torch.tensor([0.3, 1.7, 0.9, 4.2, 0.31, 2.5], dtype=torch.float64, requires_grad=True)
    mu, sigma, draw = statistics.fmean(scores.tolist()), statistics.pstdev(scores.tolist()), random.Random(0)
    c_hat = cadft.batch_zscore(scores)
    assert_close(c_hat, ((scores - mu) / (sigma + 1e-6)).detach())
    assert not c_hat.requires_grad
    for size in (1, *(draw.randint(2, 256) for _ in range(200))):
        equal = cadft.batch_zscore(torch.full((size,), draw.uniform(0, 20)))
        assert (equal == 0).all() and (cadft.compatibility_weight(equal) == 1).all()
    # a second rank has the last three, or a row more
    monkeypatch.setattr(cadft, "gather", lambda x: torch.cat([x, scores[3:] if x.is_floating_point() else x]))
    assert_close(cadft.batch_zscore(scores[:3]), c_hat[:3])
    monkeypatch.setattr(cadft, "gather", lambda x: torch.cat([x, x + 1]))
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        cadft.batch_zscore(scores[:3])


def test_weight_and_cadft_loss_by_hand_and_beta_0_is_dft():
    c_hat = torch.tensor([-3.0, 0.0, 1.0, 2.0, 1e30], requires_grad=True)
    loss = torch.tensor([1.0, 2.0, 6.0, 0.5, 3.0], requires_grad=True)
    w = cadft.compatibility_weight(c_hat, beta=0.5)
    assert_close(w, torch.tensor([1.0, 1.0, math.exp(-0.5), math.exp(-1.0), 0.0]))
    assert not w.requires_grad
    total = cadft.cadft_loss(loss, w.requires_grad_())
    total.backward()
    assert total.item() == pytest.approx((3 + 6 * math.exp(-0.5) + 0.5 * math.exp(-1)) / 5)
    assert_close(loss.grad, w.detach() / 5)                    # by |B|, not by the sum of w
    assert w.grad is None
    w = cadft.compatibility_weight(c_hat, beta=0.0)
    assert (w == 1).all() and torch.equal(cadft.cadft_loss(loss, w), loss.sum() / 5)
    for beta in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta"):
            cadft.compatibility_weight(c_hat, beta)


@pytest.mark.parametrize("two_pass", (False, True))
def test_a_step_over_micro_batches_has_the_gradients_and_logs_the_numbers_of_the_definition(two_pass):
    lm, a = tiny().double(), train.parse(["--beta", "2", "--clip", "inf", "--steps", "30"])
    a.two_pass = two_pass
    sizes = ((3, 4), (2, 6)), ((1, 1), (2, 2)), ((4, 9),)
    parts = [some_batch(lengths, seed=seed) for seed, lengths in enumerate(sizes, 1)]
    nll = [n for ids, seen, labels in parts for n in naive_nll(lm, ids, labels, attention_mask=seen)]
    c_raw = torch.stack([n.mean() for n in nll])
    dft = torch.stack([(n.neg().exp().detach() * n).mean() for n in nll])
    w = torch.exp(-2 * ((c_raw - c_raw.mean()) / (c_raw.std(correction=0) + 1e-6)).clamp(min=0)).detach()
    naive = torch.autograd.grad((w * dft).sum() / 5, list(lm.parameters()))
    batches = [dict(input_ids=ids, labels=labels, index=torch.arange(len(ids)) + 2 * i)
               for i, (ids, _, labels) in enumerate(parts)]
    keep = train.argparse.Namespace(step=lambda: None, zero_grad=lambda: None)     # leaves gradients there
    examples = [train.Example(i, i + 1, n, n) for i, n in enumerate(nll)]
    run = train.Run(a, lm, None, examples, keep, None, 1, 1)
    net, order = train.ResponseNLL(lm, False), []
    net.register_forward_hook(lambda *_: order.append("forward" if torch.is_grad_enabled() else "score"))
    lm.get_input_embeddings().weight.register_hook(lambda _: order.append("backward"))
    row = train.log_row(run, train.train_step(run, net, batches), 1.0)
    twice = ["score"] * 3 + ["forward", "backward"] * 3
    assert order == (twice if two_pass else ["forward"] * 3 + ["backward"])
    assert_close(tuple(p.grad for p in lm.parameters()), naive, rtol=1e-12, atol=1e-12)
    expected = dict(loss=w * dft, dft=dft, nll=torch.cat(nll), c_mean=c_raw, w_mean=w, w_min=w.min(),
                    c_std=c_raw.std(correction=0), down_weighted=(w < 1).double())
    for name, value in expected.items():
        assert row[name] == pytest.approx(value.mean().item(), rel=1e-9), name
    assert not torch.equal(*(train.ResponseNLL(tiny(), half)(*parts[0][::2])[0] for half in (True, False)))


# ==== Rewriting ============================================================================================

def test_rewriting_is_due_every_K_steps_and_picks_the_highest_persistent_moving_averages():
    assert [t for t in range(30) if cadft.rewriting_due(t, 12, 5)] == [12, 17, 22, 27]
    assert not any(cadft.rewriting_due(t, 0, 0) for t in range(30))
    ema, other = cadft.CompatibilityEMA(4, decay=0.9), cadft.CompatibilityEMA(4)
    ema.update(torch.tensor([2, 0]), torch.tensor([1.0, -1.0]))
    ema.update(torch.tensor([2]), torch.tensor([2.0]))
    other.load_state_dict(ema.state_dict())
    ema.forget(2)
    assert ema.mean.tolist() == [-1, 0, 0, 0] and ema.seen.tolist() == [1, 0, 0, 0]
    assert other.mean.tolist() == pytest.approx([-1, 0, 0.9 * 1 + 0.1 * 2, 0]) and other.seen[2] == 2
    with pytest.raises(ValueError, match="twice"):
        ema.update(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="decay"):
        cadft.CompatibilityEMA(3, 1.0)
    ema, c_hat = cadft.CompatibilityEMA(100), torch.linspace(-1, 1, 100)
    ema.update(torch.arange(100), c_hat)
    assert ema.pick(1.0) == []                                 # seen once: nothing is persistent yet
    ema.update(torch.arange(90), c_hat[:90])                   # the ten highest are not seen again
    assert ema.pick(1.0) == list(range(89, 49, -1))            # average above 0 only
    assert ema.pick(0.29) == list(range(89, 60, -1))           # 29 of them
    assert ema.pick(0.005) == [89] and ema.pick(0) == []       # half an example: at least one


def test_defaults_are_the_papers_constants_in_flags_and_functions():
    paper = dict(beta=1.0, eps=1e-6, rewrite_after=3000, rewrite_every=1000, rewrite_fraction=0.005,
                 rewrite_prob=0.5, rewrite_top_p=0.9, rewrite_temperature=0.7, batch_size=256, lr=5e-5)
    assert paper.items() <= vars(train.PARSER.parse_args([])).items()
    functions = (cadft.compatibility_weight, cadft.batch_zscore, cadft.rewriting_due,
                 cadft.CompatibilityEMA.pick, cadft.nucleus_sample.__wrapped__)
    assert [f.__defaults__ for f in functions] == [(1.0,), (1e-6,), (3000, 1000), (0.005,), (0.9, 0.7, 0)]
    assert cadft.CompatibilityEMA(1).decay == train.PARSER.parse_args([]).ema_decay == 0.5     # ours


def test_sampling_obeys_top_p_and_temperature_alone_is_seeded_and_leaves_all_as_it_was():
    lm = tiny(vocab_size=60, initializer_range=0.6).train()
    prompt, n, stops = [1, 7, 12, 30, 7], 6000, [2, 9, 17]
    lm.generation_config.update(do_sample=True, top_k=20, repetition_penalty=3.0, temperature=0.3, top_p=0.5,
                                max_length=20, eos_token_id=2)     # what would interfere
    z = lm(input_ids=torch.tensor([prompt])).logits[0, -1].double().detach()
    settings, state = lm.generation_config, torch.get_rng_state()
    for top_p, temperature in (0.9, 0.7), (1.0, 30.0):         # of the second, top-k 50 would cut something
        p, order = torch.softmax(z / temperature, -1).sort(descending=True)
        inside = (p.cumsum(-1) - p) < top_p                    # the smallest set that reaches top_p
        expected = torch.zeros_like(p).index_put((order[inside],), p[inside] / p[inside].sum())
        drawn = cadft.nucleus_sample(lm, [prompt] * n, [2], 0, 1, top_p, temperature, seed=1)
        share = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(z)) / n
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()
    prompts = [[1, 5, 9], [1, 8], [1, 4, 4, 4, 6, 9, 11]] * 70
    one, same, other = (cadft.nucleus_sample(lm, prompts, stops, 0, 12, seed=seed) for seed in (3, 3, 4))
    assert one == same != other
    assert all(not set(ids[:-1]) & set(stops) for ids in one)
    assert {len(ids) for ids in one if ids[-1] not in stops} == {12} and any(ids[-1] in stops for ids in one)
    for prompt, got in zip(prompts, cadft.nucleus_sample(lm, prompts[:3], [2], 2, 30, temperature=0)):
        for i, token in enumerate(got):                        # greedy: the argmax
            assert token == lm(input_ids=torch.tensor([prompt + got[:i]])).logits[0, -1].argmax()
    with pytest.raises(Exception):
        cadft.nucleus_sample(lm, prompts, stops, 0, 0)         # no room for a single token
    assert torch.equal(state, torch.get_rng_state()) and lm.training and lm.generation_config is settings


def seeing():
    """A random Qwen2-VL in float64 for images of 8 x 8 pixels."""
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    rope = dict(rope_type="default", rope_theta=100.0, mrope_section=[2, 3, 3])
    text = dict(vocab_size=48, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    tower = dict(depth=2, num_heads=2, embed_dim=32, hidden_size=32, patch_size=2)
    lm = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(
        "qwen2_vl", text_config=size | text | dict(rope_parameters=rope), vision_config=tower,
        image_token_id=IMAGE)).double().eval()
    torch.manual_seed(0)
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.5)                      # with the usual 0.02 no image would matter
    return lm


def test_vision_language_models_nll_is_that_of_their_own_logits_and_rewriting_looks_at_the_images():
    def images(ids, first=0):                                  # row i shows image first + i, 16 patches
        return dict(pixel_values=pixels[first:first + len(ids)].flatten(0, 1),
                    image_grid_thw=torch.tensor([[1, 4, 4]] * len(ids)),
                    mm_token_type_ids=(ids == IMAGE).long())
    lm, (ids, seen, labels) = seeing(), some_batch([(6, 4), (9, 2), (7, 7)])
    pixels = torch.randn(3, 16, 2 * 2 * 2 * 3, dtype=torch.float64)
    ids[:, 1:5] = IMAGE
    nll, mask = cadft.token_nll(lm, ids, seen, labels, 3, **images(ids))
    own = torch.cat(naive_nll(lm, ids, labels, attention_mask=seen, **images(ids)))
    ours, expected = (torch.autograd.grad(x.sum(), list(lm.parameters()), materialize_grads=True)
                      for x in (nll, own))
    assert_close((nll[mask], *ours), (own, *expected), rtol=1e-12, atol=1e-12)
    assert all(g.any() for (name, _), g in zip(lm.named_parameters(), ours) if "patch_embed" in name)
    prompts = [[7, *[IMAGE] * 4, *tail] for tail in ([9], [30, 12, 5], [8, 21])]
    left = torch.tensor([[1] * (8 - len(p)) + p for p in prompts])     # pad = eos
    more = dict(suppress_tokens=[IMAGE], **images(left))
    for i, got in enumerate(cadft.nucleus_sample(lm, prompts, [1], 1, 8, temperature=0, **more)):
        row = torch.tensor([prompts[i] + got])
        z = lm(input_ids=row, **images(row, i)).logits[0, len(prompts[i]) - 1:-1]
        assert got == z.index_fill(1, torch.tensor(IMAGE), -torch.inf).argmax(1).tolist()


# ==== The loop =============================================================================================

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
            "--nproc-per-node=2")
USUAL = ("--batch-size", 4, "--max-length", 64, "--lr", 1e-3, "--steps", 12)
REWRITING = ("--rewrite-after", 12, "--rewrite-every", 3, "--rewrite-fraction", 0.2, "--rewrite-prob", 0.8,
             "--rewrite-max-tokens", 40, "--lr", 1e-2, "--steps", 30, "--dtype", "float64")
ROLES = "system", "user", "assistant", "user", "assistant", "user"
TURNS = [{"role": role, "content": text} for role, text in zip(ROLES, ("x", "1+1:", "y", "1+1:", "z", "u"))]
PLAIN, PAIR = {"prompt": "1+1:", "response": "2"}, {"messages": TURNS[1:3]}


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


def log(out, name="log.jsonl", drop=("seconds", "tokens_per_second")):
    lines = [json.loads(line) for line in Path(out, name).read_text("utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tiny model and data, and one float64 run on them that rewrites."""
    path = tmp_path_factory.mktemp("made")
    model, data = folder(path / "model"), jsonl(path / "data.jsonl", rows())
    flags = [*USUAL, "--model", model, "--data", data, "--prompt-template", "{prompt}:", *REWRITING]
    made = {"path": path, "model": model, "data": data, "flags": flags, "one": path / "one"}
    again(made, path / "one")
    return made


def again(made, out, *flags, code=0):
    """A run with the fixture's flags, into another folder; of a flag given twice, the last one counts."""
    assert train.main([*map(str, (*USUAL, *made["flags"], "--out", out, *flags))]) == code


def interrupted(made, out, step, *flags):
    """The same, but it ends in the middle of a step."""
    def killed(run, *args, inner=train.train_step):
        if run.step == step:
            raise KeyboardInterrupt
        return inner(run, *args)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", killed)
        again(made, out, *flags)


def command_line(*command, code=0):
    done = subprocess.run([*map(str, command)], text=True, capture_output=True, timeout=240)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def test_every_rank_takes_its_part_of_one_seeded_permutation():
    a, taken = train.parse(["--batch-size", "8", "--micro-batch-tokens", "60", "--seed", "5"]), {}
    examples = [train.Example(i, i, torch.ones(3), torch.ones(7 * i % 40 + 1)) for i in range(50)]
    for step, world in itertools.product(range(1, 13), (1, 2, 4)):
        run = train.Run(a, None, None, examples, None, None, 6, step)
        parts = [train.share(run, rank, world) for rank in range(world)]
        assert {sum(map(len, part)) for part in parts} == {8 // world}
        batches = sum(parts, [])
        assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= 60 for batch in batches)
        index = sorted(e.index for batch in batches for e in batch)
        assert index == taken.setdefault(step, index)
    epochs = [sum((taken[step] for step in steps), []) for steps in (range(1, 7), range(7, 13))]
    assert all(len(set(seen)) == len(seen) == 48 for seen in epochs) and epochs[0] != epochs[1]
    a.seed, run.step = 6, 1
    assert sorted(e.index for batch in train.share(run, 0, 1) for e in batch) != taken[1]


@ARCHITECTURES
def test_it_trains_every_architecture_and_leaves_an_ordinary_folder(architecture, tmp_path):
    """From weights in bfloat16, which become float32, in a folder as they are found: with two chat templates,
    masks that are no weights, and settings that couldn't be saved."""
    chat = {"default": CHAT, "tool_use": CHAT} if architecture in ("llama", "gpt2") else None
    start, out = tiny(architecture).bfloat16(), tmp_path / "out"
    names = "bias", "masked_bias", "attention.bias", "causal_mask"
    masks = {f"h.0.attn.{name}": torch.ones(1) for name in names}
    model = folder(tmp_path / "model", start, characters(chat), state_dict=start.state_dict() | masks)
    settings = {"do_sample": False, "temperature": 0.6, "eos_token_id": [2, None, -1], "stop_strings": ["a"]}
    Path(model, "generation_config.json").write_text(json.dumps(settings))
    flags = ["--model", model, "--data", jsonl(tmp_path / "data.jsonl", rows()), "--lr", 1e-2, "--steps", 24]
    again({"flags": flags}, out, "--dtype", "bfloat16" if chat else "float32")
    assert len(log(out)) == 24 and log(out)[-1]["nll"] < log(out)[0]["nll"]
    lm = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    weight, before = (x.get_input_embeddings().weight for x in (lm, start))
    assert lm.dtype == torch.float32 and (weight.bfloat16() != before).any()
    assert tokenizer.chat_template == chat and tokenizer("1+1:")["input_ids"] == [3 + 1, 13, 3 + 1, 16]
    assert not any(value for name, value in vars(lm.config).items() if "drop" in name)


def same_run(one, other):
    """Two runs log the same, up to rounding, and rewrite the same."""
    assert log(one, "rewrites.jsonl", ("average",)) == log(other, "rewrites.jsonl", ("average",)), other
    for a, b in zip(log(one), log(other), strict=True):
        for name in ("loss", "nll", "dft", "c_mean", "c_std", "w_mean", "w_min", "grad_norm"):
            assert math.isclose(a[name], b[name], rel_tol=1e-8 if a["step"] <= 10 else 1e-4), (name, a, b)


@pytest.mark.ranks
def test_ranks_micro_batches_checkpointing_and_two_passes_do_not_change_the_run(made, tmp_path, monkeypatch):
    again(made, tmp_path / "no checkpointing", "--micro-batch-tokens", 40, "--no-gradient-checkpointing")
    again(made, tmp_path / "single rows, two passes", "--micro-batch-tokens", 1, "--two-pass")
    whole = tmp_path / "two ranks"
    command_line(*TORCHRUN, HERE / "train.py", *made["flags"], "--out", whole)
    for other in tmp_path.iterdir():
        same_run(made["one"], other)
    monkeypatch.setattr(train.rewrite, "__defaults__", (1,))   # each rewrite is a chunk of its own
    wild = "--rewrite-temperature", 3                          # no two samples are alike
    again(made, tmp_path / "chunks", *wild)
    start = *TORCHRUN, *patched("train.rewrite.__defaults__ = (1,)"), *made["flags"], *wild
    command_line(*start, "--micro-batch-tokens", 20, "--two-pass", "--out", tmp_path / "chunks on two ranks")
    same_run(tmp_path / "chunks", tmp_path / "chunks on two ranks")
    lost = ("if os.environ['RANK'] > os.environ['TORCHELASTIC_RESTART_COUNT']:\n"      # rank 1, at first
            "    train.rewrite = lambda run: os.kill(os.getpid(), 9)")
    start = *TORCHRUN, "--max-restarts=3", *patched(lost), *made["flags"], "--save-every", 5, "--resume"
    command_line(*start, "--out", tmp_path / "healed")
    equal_runs(whole, tmp_path / "healed")


@pytest.mark.parametrize("flags, said", (
    ((), "after step 12 and every 3 steps"), (("--steps", 11), "never"), (("--method", "dft"), "never"),
    (("--rewrite-after", 0, "--rewrite-every", 4), "after step 8 and every 4"),
    (("--rewrite-every", 0), "never"), (("--rewrite-fraction", 0), "never")))
def test_a_run_says_when_rewriting_can_happen(flags, said, made, tmp_path, capsys):
    interrupted(made, tmp_path / "out", 1, *flags)
    assert f"rewriting: {said}" in capsys.readouterr().out


def test_rewriting_end_to_end_and_the_learning_rate(made):
    audit, steps, last = log(made["one"], "rewrites.jsonl"), log(made["one"]), {}
    texts = {i: row["response"] for i, row in enumerate(rows(), 1)}
    for row in audit:
        assert row["step"] in range(12, 31, 3) and row["average"] > 0
        assert row["old"] == texts[row["line"]]                # the one in force
        assert row["step"] - last.get(row["line"], -9) >= 6    # forgotten: two more visits take two rounds
        if "new" in row:
            texts[row["line"]], last[row["line"]] = row["new"], row["step"]
    for step in steps:                                         # counted after the round, not in its own row
        new = {row["line"] for row in audit if "new" in row and row["step"] < step["step"]}
        assert step["rewritten"] == len(new)
    assert any("rewritten" in step["kinds"] for step in steps)  # and they are trained on
    told = log(made["one"], "compatibility.jsonl")
    assert told == sorted(told, key=lambda row: -row["average"])
    for row in told:
        assert row["kind"] == rows()[row["line"] - 1]["kind"] and row["rewritten"] == (row["line"] in last)
        assert row["visits"] == 5 or row["rewritten"]          # 30 steps of 4 from 24
    cosine = [0.5e-2 * (1 + math.cos(math.pi * t / 27)) for t in range(27)]     # to 0 at step 31
    warm = [1e-2 / 3, 2e-2 / 3, 1e-2]                          # a tenth of the steps
    assert [step["lr"] for step in steps] == pytest.approx(warm + cosine)


def test_the_highest_are_picked_and_empty_or_cut_off_ones_keep_the_original(made, monkeypatch, tmp_path):
    def watched(run, *args, inner=train.train_step):
        table = inner(run, *args)
        tracker.update(table["index"], table["c_hat"])
        if run.step in range(12, 31, 3):
            picked.extend((run.step, i + 1, tracker.mean[i].item()) for i in tracker.pick(0.2))
        return table
    def sampled(lm, prompts, stops, pad, limit, *, seed, **how):
        lengths.append(max(map(len, prompts)) + limit)
        seeds.append(seed)
        return [next(ids) for _ in prompts]
    ids, picked, tracker = itertools.cycle(([2], [5, 6, 7])), [], cadft.CompatibilityEMA(24, 0.8)
    lengths, seeds = [], []
    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.setattr(cadft, "nucleus_sample", sampled)
    monkeypatch.setattr(train.rewrite, "__defaults__", (2,))   # two in a chunk
    again(made, tmp_path / "out", "--ema-decay", 0.8, "--max-length", 20)
    assert set(lengths) == {20} and len(set(seeds)) == len(seeds) > 7
    audit = log(tmp_path / "out", "rewrites.jsonl")            # all are kept: nothing is forgotten
    assert [(row["step"], row["line"], row["average"]) for row in audit] == picked
    assert {row["kept"] for row in audit} == {"empty", "cut off", "not drawn"}
    told = {row["line"] - 1: row["average"] for row in log(tmp_path / "out", "compatibility.jsonl")}
    assert [told[i] for i in range(24)] == tracker.mean.tolist()


def test_methods_take_one_path_beta_0_is_dft_and_the_report_is_of_what_was_seen(made, tmp_path, capsys):
    for name, *flags in ("sft",), ("focal",), ("casft", "--beta", 0), ("cadft", "--beta", 0), ("dft",):
        capsys.readouterr()
        again(made, tmp_path / name, "--method", name, "--steps", 2, *flags)
    told = re.findall(r"(\d+) seen, on average c_hat +(\S+), w (\S+)", capsys.readouterr().out)
    again(made, tmp_path / "weighted", "--method", "casft", "--steps", 2)
    logs = {path.name: log(path) for path in tmp_path.iterdir()}
    assert logs["weighted"][0]["w_min"] < 1 and logs["dft"] == logs["cadft"] and logs["sft"] == logs["casft"]
    first, dft, sft = log(made["one"])[0], logs["dft"][0], logs["sft"][0]
    assert first["loss"] < dft["loss"] < logs["focal"][0]["loss"] < sft["loss"]
    assert dft["w_min"] == 1 > first["w_min"] and sft["dft"] == dft["dft"]
    seen, c_hat, w = zip(*[map(float, row) for row in told])
    assert sum(seen) == 2 * 4 and set(w) == {1.0}              # the weights in force, of dft
    assert sum(n * c for n, c in zip(seen, c_hat)) == pytest.approx(0, abs=0.02 * 8)


@pytest.mark.parametrize("flag, value", (("eps", 1), ("rewrite-top-p", 0.1), ("rewrite-temperature", 99),
                                         ("rewrite-max-tokens", 1), ("weight-decay", 9), ("clip", 1e-9)))
def test_settings_take_effect(flag, value, made, tmp_path):
    again(made, tmp_path / "out", f"--{flag}", value)
    names = "log.jsonl", "rewrites.jsonl"
    assert any(log(tmp_path / "out", name) != log(made["one"], name) for name in names)


def test_what_is_not_finite_stops_the_run_and_names_the_lines(made, refused, tmp_path, monkeypatch):
    def nan_for_some(lm, ids, *rest, inner=cadft.token_nll, **more):
        nll, mask = inner(lm, ids, *rest, **more)
        return torch.where((ids == 5).sum(1, keepdim=True) >= 2, math.nan, nll), mask  # "2+2:"
    flags = *made["flags"], "--out", tmp_path / "out", "--lr", 1e38, "--warmup-ratio", 0, "--steps", 1
    refused(["weights are not finite after step 1"], *flags, "--dtype", "float32", "--weight-decay", 1e9)
    assert not list(tmp_path.glob("out/*.safetensors")) and not (tmp_path / "out" / "checkpoint.pt").exists()
    monkeypatch.setattr(cadft, "token_nll", nan_for_some)
    words = ["not finite at step 1, lines [3, 13, 21, 22, 23, 24]"]
    refused(words, *made["flags"], "--batch-size", 24, "--out", tmp_path / "other")


# ==== Data and models ======================================================================================

def load(tmp_path, content, *flags, tokenizer=None):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode())
    a = train.parse(["--model", "m", "--data", str(path), *flags])
    return train.load_examples(a, tokenizer or characters())[0]


@pytest.mark.parametrize("line, chat, flags, expected", (
    (PLAIN, None, (), "1+1:|2<eos>"), (PLAIN, CHAT, (), "<bos>u:1+1:#a:|2#<eos>"),
    ({"messages": TURNS}, CHAT, (), "<bos>s:x#u:1+1:#a:y#u:1+1:#a:|z#<eos>"),
    ({"prompt": "<bos>1", "response": "2<eos>"}, None, (), "<bos>1|2<eos>"),    # neither is doubled
    (PAIR | PLAIN, None, (), "1+1:|2<eos>"), (PAIR | {"prompt": "p"}, None, (), "1+1:|y<eos>"),
    (PAIR | {"a": "p", "b": "q"}, None, ("--prompt-field", "a", "--response-field", "b"), "p|q<eos>"),
    (PAIR, None, ("--prompt-template", "z{prompt}a{prompt}"), "z1+1:a1+1:|y<eos>")))
def test_prompts_and_responses_as_text(line, chat, flags, expected, tmp_path):
    e, = load(tmp_path, [line], *flags, tokenizer=characters(chat))
    assert "|".join(map(characters().decode, (e.prompt_ids, e.response_ids))).replace(" ", "") == expected


def test_responses_are_cut_what_is_unused_is_told_and_odd_but_legal_files_load(tmp_path, capsys):
    lines = [{"prompt": "1" * n, "response": "2" * 5, "input": "1+1"} for n in (3, 11, 13, 16, 17, 40)]
    examples = load(tmp_path, lines, "--max-length", "16")
    assert [(e.line, e.index, len(e), e.response_ids[-1] == 2) for e in examples] == [
        (1, 0, 3 + 5 + 1, True), (2, 1, 16, False), (3, 2, 16, False)]
    said = capsys.readouterr().out
    for words in ("cut at 16 tokens with their prompt in 2 rows", "no room for the response in 3 rows",
                  "never used: input in 6 rows"):
        assert words in said
    masked = {"messages": [turn | {"weight": 0, "name": None} for turn in TURNS]}
    load(tmp_path, [masked, {"messages": TURNS}, masked], tokenizer=characters(CHAT))
    said = capsys.readouterr().out
    assert "never used: weight of turns in 2 rows\n" in said and "name of turns" not in said
    line = json.dumps(PLAIN).encode()
    for content in line + b"\n\n", line + b"\r\n" + line, b"\xef\xbb\xbf" + line, b"\n" + line:
        assert {tuple(e.prompt_ids.tolist()) for e in load(tmp_path, content)} == {(4, 13, 4, 16)}


BODY = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
THINK = BODY.replace("{{ m.content }}", "{% if m.reasoning_content and loop.last %}<think>\n"
                     "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}")
CALLS = BODY.replace("<|im_end|>", "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}"
                     "</tool_call>{% endfor %}<|im_end|>")
SHAPES = {     # name: template, what the last turn has besides or instead, what follows the prompt as text
    "trimmed": (BODY.replace("m.content", "m.content | trim"), {"content": " \n4 \n"}, "4<|im_end|>"),
    "end of turn that is no eos, not trimmed": (BODY, {"content": "  4\n\n"}, "  4\n\n<|im_end|>"),
    "channel": (BODY.replace("m.role }}\n", "m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}\n")
                .replace("assistant\n{%", "assistant{%"), {}, "<|channel|>final\n4 <3<|im_end|>"),
    "two closing marks": (BODY.replace("<|im_end|>", "<|done|>\n<|im_end|>"), {}, "4 <3<|done|>\n<|im_end|>"),
    "newline behind the header": (BODY.replace("assistant\n{%", "assistant{%"), {}, "\n4 <3<|im_end|>"),
    "no generation prompt": (BODY.replace("<|im_end|>", "<|done|><|im_end|>").split("{% if")[0], {},
                             "<|im_start|>assistant\n4 <3<|done|><|im_end|>"),
    "reasoning": (THINK + "{% if add_generation_prompt %}<think>\n{% endif %}",
                  {"reasoning_content": "3+1"}, "3+1\n</think>\n\n4 <3<|im_end|>"),
    "tool calls": (CALLS, {"content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
                   '<tool_call>{"name": "add", "arguments": {}}</tool_call><|im_end|>'),
    "nothing at the end, for a tag is none": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}", {"content": "4</think>"}, "4</think>\n</s>")}
ASKED, GIVEN = {"role": "user", "content": "1+\n3?"}, {"role": "assistant", "content": "4 <3"}


def marked(chat):
    """A tokenizer of bytes that knows some marks as one token each, and runs of spaces."""
    marks = "<|im_start|> <|im_end|> <|channel|> <|done|> <think> </think> <tool_call> </tool_call>"
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    tokenizer.add_tokens([*marks.split(), "  "])
    tokenizer.chat_template = chat
    return tokenizer


@pytest.mark.parametrize("shape", SHAPES)
def test_prompt_and_response_are_what_the_template_writes_and_its_end_becomes_a_stop(shape):
    chat, more, expected = SHAPES[shape]
    tokenizer = marked(chat)
    for before in [], [{"role": "system", "content": "s"}, ASKED, GIVEN]:
        turns = [*before, ASKED, GIVEN | more]
        prompt, response = train.encode(tokenizer, turns)
        asked, whole = (tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=ask)
                        for some, ask in ((turns[:-1], True), (turns, False)))
        assert (tokenizer.decode(prompt), tokenizer.decode(response)) == (asked, expected)
        assert (asked + expected.removesuffix("</s>")).strip() == whole.strip()
        end = tokenizer.eos_token if expected.endswith("</s>") else "<|im_end|>"
        assert tokenizer.decode(response[-1]) == end
        assert response[-1] in train.stop_ids(tiny(), tokenizer) or shape == "reasoning"


@pytest.mark.parametrize("chat, given, words", (
    (BODY + "{% if add_generation_prompt %}<think>\n{% endif %}", {}, ("asks with", "<think>")),
    (BODY, {"reasoning_content": "lost"}, ("leaves out", "lost")),
    (BODY, {"tool_calls": [{"function": {"name": "add"}}]}, ("leaves out", "add")),
    (CALLS, {"tool_calls": [{"function": {"name": "add", "arguments": '{"n": "1"}'}}]}, ("leaves", "'{\"n")),
    (CALLS.replace("c.function |", "c.function.name |"),
     {"tool_calls": [{"function": {"name": "add", "arguments": {"n": "seven"}}}]}, ("leaves", "seven")),
    (BODY.split("{% if")[0] + "<|im_start|>assistant\n", {}, ("opens a turn", "add_generation_prompt")),
    (BODY.split("{% if")[0].replace("m.role }}\n", "'<|done|>' if m.role == 'user' else '<|channel|>' }}")
     + "<|im_start|><|channel|>", {}, ("opens a turn", "'channel|>'")),
    (BODY.replace("{% for m in", "{% for m in messages[1:] if m in"), {}, ("leaves out", "user")),
    ("1+\n3? add" + BODY, {"content": "", "tool_calls": [{"function": {"name": "add"}}]}, ("leaves", "add")),
    (None, {"content": None, "reasoning_content": "4"}, ("leaves out",)),
    (BODY, {"tool_calls": "x"}, ("list",)),
    (BODY, {"content": None}, ("empty",)), (BODY, {"content": ["4"]}, ("not text",)),
    ("{{ raise_exception('no') }}", {}, ("refuses", "no"))))
def test_what_the_template_leaves_out_or_asks_otherwise_is_a_mistake(chat, given, words):
    with pytest.raises(train.Mistake) as told:
        train.encode(marked(chat), [ASKED, GIVEN | given])
    assert all(word in str(told.value) for word in words)
    thought = GIVEN | {"content": "<think>3</think>", "tool_calls": [{"function": {"name": "add"}}]}
    train.encode(marked(CALLS), [ASKED, thought, ASKED, GIVEN])
    with pytest.raises(train.Mistake, match="leaves out the tools"):
        train.encode(marked(BODY), [ASKED, GIVEN], [{"type": "function", "function": {"name": "add"}}])


def test_tokens_that_are_not_the_text_are_told_and_lost_spaces_or_letters_refused(tmp_path, capsys):
    import tokenizers
    from tokenizers import decoders, normalizers
    def changed(old, new, decoder=None):
        tokenizer = characters()
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(old, new)
        tokenizer.backend_tokenizer.decoder = decoder or tokenizer.backend_tokenizer.decoder
        return tokenizer
    drops = changed(" ", ",", decoders.Metaspace(",", "always"))       # a space that starts what it decodes
    prompt, response = (drops(text)["input_ids"] for text in (" 1 2", " 3 4"))
    assert drops.decode(response) == "3 4" and train.response_text(drops, prompt, response) == " 3 4"
    lossy, deaf = changed(" ", ",", decoders.Replace(",", "")), changed("1", "\u4e2d")
    for tokenizer, text, lost in (lossy, "a b", "'a b' becomes 'ab'"), (deaf, "1", "'1' becomes ''"):
        with pytest.raises(train.Mistake, match=f"line 1: letters or spaces are lost: {lost}"):
            load(tmp_path, [PLAIN | {"prompt": text}], tokenizer=tokenizer)
    load(tmp_path, [PLAIN | {"prompt": " a b"}], tokenizer=drops)
    assert "text" not in capsys.readouterr().out
    pieces = ["<unk>", "<eos>", "|", "\n", "x", "a", "|x", "|a"]       # as Llama 2's: "x a" is |x |a
    bpe = tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [("|", "x"), ("|", "a")])
    inner = tokenizers.Tokenizer(bpe)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("|", "always")
    spaced = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert train.encode(spaced, [ASKED | {"content": "x "}, GIVEN | {"content": "a"}]) == ([6, 2], [5, 1])
    load(tmp_path, [PLAIN | {"prompt": "1\u4e2d"}] * 2)
    assert capsys.readouterr().out.count("not quite the text: '1\u4e2d' becomes '1'") == 1


def test_weights_lie_as_torchs_own_text_splits_as_its_file_says_and_special_tokens_stop(tmp_path, capsys):
    from tokenizers import pre_tokenizers
    lm, tokenizer = tiny("qwen2"), characters()                # transformers has a tokenizer for this model
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("|", "never")
    lm.generation_config.eos_token_id = [2, 40]                # 40 is a letter
    lm, loaded = train.load_model(folder(tmp_path / "m", lm, tokenizer), torch.float32)
    assert {tensor.data_ptr() % 64 for tensor in (*lm.parameters(), *lm.buffers())} == {0}
    assert loaded("1 + 1")["input_ids"] == tokenizer("1 + 1")["input_ids"]
    assert lm.generation_config.eos_token_id == [2] and "ordinary tokens" in capsys.readouterr().out
    assert lm.generation_config.pad_token_id == 0              # other settings are as they were
    flags = "--batch-size", "1", "--max-length", "64", "--out", str(tmp_path / "out")
    a = train.parse(["--model", "m", "--data", jsonl(tmp_path / "data.jsonl", [PLAIN]), *flags])
    examples, ends = train.load_examples(a, characters())
    train.new_run(a, lm, None, examples, ends | {40})
    assert lm.generation_config.eos_token_id == [2, 40] and lm.training and lm.is_activation_checkpointing


def test_untrained_weights_and_random_numbers_are_refused_and_longrope_limits_the_length():
    unused = tiny()
    unused.model.unused = torch.nn.Linear(2, 2, bias=False)    # no gradient
    with pytest.raises(train.Mistake, match="nothing would train: .*unused"):
        train.check_training(unused)
    noisy = tiny("mixtral", router_jitter_noise=0.01)
    train.check_training(noisy.eval())
    with pytest.raises(train.Mistake, match="draws random numbers"):
        train.check_training(noisy.train())
    rope = dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, rope_theta=100.0,
                original_max_position_embeddings=32, factor=4.0)
    assert train.positions(tiny("phi3", rope_parameters=rope, original_max_position_embeddings=32)) == 32


# ==== Nothing lost =========================================================================================

def equal_runs(one, other):
    for name in "log.jsonl", "rewrites.jsonl", "compatibility.jsonl":
        assert log(one, name) == log(other, name)
    assert Path(one, "model.safetensors").read_bytes() == Path(other, "model.safetensors").read_bytes()
    assert not list(Path(other).glob("*.tmp")) and train.finished(other)


def test_an_interrupted_run_goes_on_to_the_bit(made, tmp_path, monkeypatch):
    def full(state, file, inner=torch.save):
        if state["step"] > 8:
            file.write(b"half")
            raise OSError("No space left on device")
        inner(state, file)
    def killed(*_, **__):                                      # when the model is written
        raise KeyboardInterrupt
    out, flags = tmp_path / "out", ("--dtype", "float32", "--resume")
    again(made, tmp_path / "whole", *flags[:2])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        again(made, out, *flags, "--save-every", 4, code=2)
    assert torch.load(out / "checkpoint.pt")["step"] == 8
    for step in 16, 22:                                        # the last step that is saved rewrote
        interrupted(made, out, step, *flags, "--save-every", 3)
        with open(out / "log.jsonl", "ab") as file:            # what a crash may leave in it
            file.write(b'{"step": 21, "nll": \xff\n{"st')
        (out / "rewrites.jsonl").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", killed)
        again(made, out, *flags, "--micro-batch-tokens", 9999)
    assert (out / "config.json").exists() and not train.finished(out)
    again(made, out, *flags)
    equal_runs(tmp_path / "whole", out)


def test_only_ones_own_run_is_resumed_wherever_its_files_lie_now(made, refused, tmp_path, capsys):
    out = tmp_path / "out"
    interrupted(made, out, 10, "--save-every", 8)
    for words, *flags in ((("--lr", "0.01", "0.5"), "--lr", 0.5),
                          (("--data-sha256",), "--data", jsonl(tmp_path / "data.jsonl", rows(seed=1)))):
        for place in out, made["one"]:                         # half done and finished
            refused(words, *made["flags"], "--out", place, "--resume", *flags)
    again(made, out, "--resume", "--data", jsonl(tmp_path / "same.jsonl", rows()))
    again(made, out, "--resume", "--model", os.path.relpath(made["model"]))
    assert "nothing to do" in capsys.readouterr().out
    equal_runs(made["one"], out)


def patched(code):
    """What torchrun starts: a train.py which does this before it runs."""
    start = f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport train\n"
    return "--no-python", sys.executable, "-c", start + code + "\nos._exit(train.main())"


@pytest.mark.ranks
@pytest.mark.parametrize("kills", (2, pytest.param(12, marks=LONG)))
def test_killed_runs_resume_to_the_bit(kills, made, tmp_path):
    """SIGKILL at random moments of a step, among them while the run saves and while it rewrites."""
    draw, out, hits = random.Random(kills), tmp_path / "out", 0
    start = sys.executable, HERE / "train.py", *made["flags"], "--save-every", 1, "--resume", "--out"
    command_line(*start, tmp_path / "whole")
    for _ in range(kills):
        process = subprocess.Popen([*map(str, start), str(out)], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("rewriting: "):                 # the first step follows
                time.sleep(draw.uniform(0, 0.2))
                process.kill()
        hits += process.wait() < 0
    command_line(*start, out)
    equal_runs(tmp_path / "whole", out)
    assert hits >= 2


def test_nothing_is_left_behind_in_another_program(made, tmp_path, monkeypatch):
    """A run, a mistake and a bug, from a thread: settings are as before, and the bug stays an exception."""
    transformers.logging.set_verbosity_info()                  # other tests leave what the program sets
    settings = torch.get_num_threads, transformers.logging.get_verbosity
    before = [setting() for setting in settings]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(again, made, tmp_path / "out", "--steps", 2).result()
        pool.submit(again, made, tmp_path / "out", "--bach-size", 2, code=2).result()
        monkeypatch.setattr(train, "collate", lambda rows: {}["a student's own"])
        with pytest.raises(KeyError, match="a student's own"):
            pool.submit(again, made, tmp_path / "other").result()
    assert [setting() for setting in settings] == before


# ==== The classroom, and what the README prints =============================================================

@pytest.fixture
def classroom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.BASE_RUN, "steps", 4)
    monkeypatch.setattr(train, "DOCUMENTS", 160)
    return ["--steps", "4", "--classroom-size", "64"]


def test_the_base_model_is_an_ordinary_run_made_as_a_whole_and_once_for_all_methods(classroom):
    base, runs = Path("out", "base-seed0"), [Path("out", f"{method}-seed0") for method in ("cadft", "focal")]
    threads = torch.get_num_threads()
    interrupted({"flags": classroom}, "out/x", 2)
    assert not base.exists()
    assert train.main(classroom) == 0
    weights = (base / "model.safetensors").read_bytes()
    assert len(log(base)) == 4 and train.read_json(Path(base, "args.json"))["method"] == "sft"
    assert train.main([*classroom, "--method", "focal"]) == 0
    assert sorted(Path("out").glob("[!.]*")) == [base, *runs]
    assert torch.get_num_threads() == threads > train.THREADS
    assert log(runs[0])[0]["c_mean"] == log(runs[1])[0]["c_mean"]      # the same base, data and order
    assert evaluate.main(["--samples", "1", "--limit", "3"]) == 0      # sums need no other package
    assert [len(log(run, "eval-classroom-3-digits.jsonl")) for run in (base, *runs)] == [6, 6, 6]
    other = [*classroom, "--out", "other/x", "--max-length", "100", "--prompt-template", "z{prompt}"]
    assert train.main(other) == 0                              # the base does not depend on the run's flags
    for place in "out", "other":
        assert Path(place, "base-seed0", "model.safetensors").read_bytes() == weights


@pytest.mark.ranks
def test_the_base_model_is_made_by_all_processes_together(classroom, monkeypatch):
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")            # as nccl: no one waits for others in joining
    code = "train.BASE_RUN['steps'], train.DOCUMENTS = 4, 160"
    command_line(*TORCHRUN, *patched(code), *classroom, "--out", "two/x")
    assert train.main(classroom) == 0
    for a, b in zip(log("out/base-seed0"), log("two/base-seed0"), strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-3)


def test_demonstrations_are_what_their_kind_says():
    a = train.parse(["--classroom-size", "4000", "--incompatible", "0.6"])
    kinds, tests = collections.Counter(), train.problems(3, 100)
    for _, row in train.classroom_rows(a):
        (x, y), kind = map(int, row["prompt"][:-1].split("+")), row["kind"]
        assert (x, y) not in tests
        worked, _, answer = row["response"].rpartition(">")
        assert (answer == str(x + y)) == (kind in ("right", "terse", "junk"))
        assert bool(worked) == (kind != "terse") and worked.isalpha() == (kind == "junk")
        assert any(c.isdigit() for c in row["response"]) == (kind != "cipher")
        kinds[kind] += 1
    assert kinds.pop("right") == pytest.approx(0.4 * 4000, rel=0.05)
    assert kinds.keys() == {*train.KINDS} and min(kinds.values()) > 0.12 * 4000
    assert train.addition(347, 586) == "7+6+0=13,4+8+1=13,3+5+1=9>933"
    assert train.is_sum("7+6>13", 13) and not train.is_sum("13", 13) and not train.is_sum(">13>13", 13)


def test_the_loop_of_ones_own_takes_a_step():
    lm, batch = tiny(), dict(zip(("input_ids", "attention_mask", "labels"), some_batch()))
    before, optimizer = lm.get_input_embeddings().weight.clone(), torch.optim.SGD(lm.parameters(), 1.0)
    blocks = re.findall(r"(?s)```python\n(.*?)\n```\n", (HERE / "README.md").read_text("utf-8"))
    code, = (block for block in blocks if "for batch in loader" in block)
    exec(code, {"loader": [batch], "lm": lm, "optimizer": optimizer})
    assert (lm.get_input_embeddings().weight != before).any()


# ==== Bad input ============================================================================================

def cases(table, sign):
    return [re.split(f" ?({sign}) ?", case) for case in re.split(" ; |\n", table.strip("\n"))]


BAD_LINES = {                                                  # second line of the data: what must be said
    b'{"prompt": "1"': "JSON", b"[" * 100_000: "JSON", b"[1]": "not list", b'{"prompt": "\xff"}': "UTF-8",
    b'{"prompt": "\\ud800"}': "UTF-8", b'{"prompt": "1"}': '"response" is missing, empty or not a string',
    b'{"prompt": "", "response": "2"}': '"prompt" is', b'{"messages": ["hi"]}': "messages",
    json.dumps({"messages": TURNS[2:3]}).encode(): "user turn",
    json.dumps({"messages": [TURNS[1] | {"content": 3}, TURNS[2]]}).encode(): "not text",
    json.dumps({"messages": TURNS[:3]}).encode(): "no chat template"}
BAD_FLAGS = """
--data nowhere.jsonl :: nowhere.jsonl & No such file ; --batch-size 1000 :: 1000 & 24 ; --bach-size 3 :: bach
--model nowhere :: nowhere ; --model NOEOS :: end-of-sequence ; --model HALF :: missing & lm_head
--data= :: --model and --data go together; with neither, the classroom runs ; --prompt-template x :: {prompt}
--model SMALL :: token 46 ; --model NAN :: not finite ; --model DEAF :: attention mask
--model BERT :: depend on later tokens ; --model VISION :: no causal language model
--model EXTRA :: no place in ; --model ADAPTER :: adapter_config.json ; --model 4BIT :: quantized; take
--max-length 129 :: 129 & 128 ; --max-length 3 :: no usable row ; --out MODEL :: not empty; --resume
--out RUN :: not empty; --resume ; --out BASE :: a name for base models ; --classroom-size 10 :: classroom
--steps 3 --epochs 1 :: --steps and --epochs ; --rewrite-prob 50 :: between 0 and 1 ; --lr nan :: --lr
"""
BAD = [(flags.split(), words.split(" & ")) for flags, _, words in cases(BAD_FLAGS, "::")]
BAD += [(("--data", f"LINE{i}"), ("line 2: ", said)) for i, said in enumerate(BAD_LINES.values())]


@pytest.fixture(scope="module")
def broken(made):
    path, spoiled, quantized, untied = made["path"], tiny(), tiny(), tiny(tie_word_embeddings=False)
    spoiled.get_input_embeddings().weight.data[5, 5] = math.nan
    quantized.config.quantization_config = {"quant_method": "awq", "bits": 4}
    half = {name: tensor for name, tensor in untied.state_dict().items() if name != "lm_head.weight"}
    extra = tiny().state_dict() | {"model.layers.0.mlp.up_proj.bias": torch.ones(64)}
    models = {"SMALL": tiny(vocab_size=10), "BERT": tiny("bert"), "NAN": spoiled, "VISION": seeing(),
              "DEAF": tiny("recurrent_gemma", lru_width=32, num_hidden_layers=3), "4BIT": quantized,
              "ADAPTER": tiny()}
    found = {name: folder(path / name, lm) for name, lm in models.items()}
    Path(found["ADAPTER"], "adapter_config.json").write_text("{}")
    for i, line in enumerate(BAD_LINES):
        found[f"LINE{i}"] = str(path / f"{i}.jsonl")
        Path(path, f"{i}.jsonl").write_bytes(b"\n".join([json.dumps(PLAIN).encode(), line, b""]))
    return found | {"HALF": folder(path / "half", untied, state_dict=half), "MODEL": made["model"],
                    "EXTRA": folder(path / "extra", state_dict=extra), "RUN": str(made["one"]),
                    "NOEOS": folder(path / "noeos", tokenizer=characters(eos=None)),
                    "BASE": str(path / "base-seed0")}


@pytest.mark.parametrize("flags, words", BAD, ids=str)
def test_bad_input_is_refused_in_a_line_and_nothing_is_written(flags, words, made, broken, refused, tmp_path):
    files = lambda: {path: path.stat().st_mtime_ns for path in made["path"].rglob("*")}
    usual, before = ("--model", made["model"], "--data", made["data"], "--out", tmp_path / "out"), files()
    refused(words, *usual, *USUAL[:4], *(broken.get(flag, flag) for flag in flags))
    assert not (tmp_path / "out").exists() and files() == before


@pytest.mark.ranks
@pytest.mark.parametrize("code, message", (
    ("sys.argv += ['--batch-size', '5']", "--batch-size 5: "),
    ("sys.argv += ['--data', 'OTHER'] * int(os.environ['RANK'])", "differ in their data")))
def test_of_two_processes_one_speaks_once_and_they_exit_with_2(code, message, made, tmp_path):
    start = patched(code.replace("OTHER", jsonl(tmp_path / "other.jsonl", rows(seed=1))))
    done = command_line(*TORCHRUN, *start, *made["flags"], "--out", tmp_path / "out", code=1)
    assert done.stderr.count("error: ") == done.stderr.count("exitcode  : 2") == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()


# ==== Evaluation ===========================================================================================

PAIRS = r"""
\dfrac{3}{7} == \frac{3}{7} ; \dfrac{7}{3} != \frac{3}{7} ; 0.333 != \frac{1}{3} ; 0.3333 == \frac{1}{3}
123456789012345678 != 123456789012345679 ; 50000 != 50001 ; 025 == 25 ; 9.8 != 9.81 ; 86,400 == 86400
4.5e33 == 4.5 \times 10^{33} ; 4.5 \cdot 10^{33} == 4.5e33 ; 4.5e32 != 4.5e33 ; 3.2e-20 != 1.6e-20
1.7 \times 10^{-19} != 1.6e-19 ; 7e-5 != 8e-5 ; 2E3 == 2000 ; 4^{1012} == 2^{2024} ; 2^{2023} != 2^{2024}
13 \text{ cm} == 13 ; (3,-2) != (-2,3) ; \{1,4,9\} == \{9,4,1\} ; 1,4 != 1,4,9 ; x=11 == 11 ; \text{(C)} == C
12.5\% == 12.5
"""
RESPONSES = r"""
\boxed{1}, no, \boxed{\frac{1}{2}}. -> \frac{1}{2} ; \boxed{\{1, 2\}} 3 -> \{1, 2\} ; so \fbox{6} -> 6
it is \boxed {\frac{1}{2} -> \frac{1}{2} ; thus $\boxed 2$. -> 2 ; \boxed 2. -> 2 ; \boxed{} 7 -> ;  ->
The answer is 12. Or the answer is: $x = 3.5$. Take 7. -> x = 3.5$ ; the answer is 2^{10} -> 2^{10}
**Answer:** $\frac{3}{4}$ -> \frac{3}{4}$ ; The final answer is **-4**. -> -4
\textbf{Answer:} 42 -> 42 ; Hence 3/4 -> Hence 3/4 ; #### **42** -> 42
7 + 11 = 18@#### 18@@Question: 5@#### 5 -> 18 ; the answer is:@@42@@It fits. -> 42
"""


def test_extraction_and_grading_are_those_of_the_tables_and_blind_to_what_stands_around():
    for response, _, answer in cases(RESPONSES, "->"):
        assert evaluate.extract_answer(response.replace("@", "\n")) == answer, response
    pytest.importorskip("math_verify")
    for answer, sign, reference in cases(PAIRS, "==|!="):
        for spelling in rf"So it is \boxed{{{answer}}}, or so.", f"####1</think>#### {answer}\nQ: #### 3":
            assert evaluate.is_correct(spelling, reference) == (sign == "=="), (spelling, reference)
        assert evaluate.is_correct(rf"\boxed{{{reference}}}", reference)
    for response in (r"Hence $\frac{3}{4}$", "It's 0.75", "so 3/4", r"**Answer:** $\frac{3}{4}$", "0.75",
                     "The answer is:\n\\[\n\\frac{3}{4}\n\\]"):
        assert evaluate.is_correct(response, r"\frac{3}{4}"), response
    steps = "#### **Step 1:** 7 + 11\n#### 2. Hence\nThe answer is: 18 of 20 dollars"
    for response in ("The answer is about 18 dollars a day.", "#### 18 dollars", r"The answer is \(18\) cm^2",
                     steps, "Answer: $18 (cheap)"):
        assert [n for n in (1, 2, 18, 20) if evaluate.is_correct(response, n)] == [18], response
    for nothing in "", " ", "$$", r"\boxed{}", "\n", r"\boxed{ }":
        assert not any(evaluate.is_correct(nothing, reference) for reference in ("0", "", nothing, "None"))
    for hostile in "9^{9^{9^9}}", "{" * 490, r"\sqrt{" * 90, "7" * 100_000, "1/0", "nan", "import os":
        assert not evaluate.is_correct(rf"\boxed{{{hostile}}}", "3")


def test_files_in_the_shapes_of_the_benchmarks_load_and_what_lacks_question_or_reference_is_named(capsys):
    told = [({"id": 60, "problem": "a", "answer": "025", "url": "u"}, "a", "025"),
            ({"id": 0, "problem": "b", "answer": 27.0, "question": "c"}, "c", "27.0"),
            ({"problem": "d", "solution": r"\boxed{1}, so \boxed{4.5e33}"}, "d", "4.5e33"),
            ({"question": "e", "final_answer": ["2", r"\frac{1}{3}"]}, "e", r"2, \frac{1}{3}"),
            ({"question": "f", "answer": "Two of 9.\n#### 18"}, "f", "18"),
            ({"problem": "g", "solution": r"\boxed{3}", "answer": r"(3, \pi)"}, "g", r"(3, \pi)"),
            ({"messages": TURNS[:3], "answer": 2}, "1+1:", "2")]
    found = evaluate.load_problems("name", enumerate([row for row, *_ in told], 1))
    assert [(p["row"]["question"], p["row"]["reference"]) for p in found] == [tuple(one[1:]) for one in told]
    assert found[-1]["turns"] == TURNS[:2]                     # a system turn, and no answer
    assert "never used: id, url" in capsys.readouterr().out
    for row in ({"answer": math.nan}, {"answer": " "}, {"answer": []}, {"reference": [1, None]},
                {"solution": "none"}, {"question": 3, "answer": 1}, {"question": "", "answer": 1},
                {"messages": [3], "answer": 1}):
        with pytest.raises(train.Mistake, match="name, line 2: "):
            evaluate.load_problems("name", [(1, told[0][0]), (2, {"question": "1"} | row)])


@pytest.mark.skipif("BENCHMARKS" not in os.environ, reason="set BENCHMARKS to the folder of the five files")
def test_the_real_benchmarks_load_and_the_official_labels_agree():
    where = Path(os.environ["BENCHMARKS"])
    for name, size in dict(aime24=30, amc23=40, minerva_math=272, olympiadbench=675, math_oai=500).items():
        loaded = evaluate.load_problems(name, train.read_jsonl(where / f"{name}.jsonl"))
        for problem in loaded:
            reference = problem["row"]["reference"]
            assert evaluate.is_correct(rf"It is \boxed{{{reference}}}, so.", reference), reference
        assert len(loaded) == size
    labelled = [row for _, row in train.read_jsonl(where / "graded_responses.jsonl")]
    agreed = sum(evaluate.is_correct(row["response"], row["reference"]) == row["correct"] for row in labelled)
    assert len(labelled) == 400 and agreed >= 399, agreed


def number(row, name, part="values"):
    """(mean, standard error) in a row of the table."""
    return tuple(row[part][:, evaluate.NUMBERS.index(name)].tolist())


def answered(problems, greedy=(), row="dft", seed=0):
    """The result of answers. "1101" are a problem's samples: 1 right, 0 wrong, c cut off."""
    told = [(i, sample, mark) for i, marks in enumerate(problems) for sample, mark in enumerate(marks)]
    told += [(i, "greedy", mark) for i, mark in enumerate(greedy)]
    return evaluate.result({"row": row, "seed": seed}, "sums", [
        {"problem": i, "sample": sample, "correct": mark == "1", "finished": mark != "c", "tokens": 10 + i}
        for i, sample, mark in told])


def error(values):
    return pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))


def test_counting_by_hand_errors_of_a_single_run_are_over_problems():
    row, = evaluate.compare([answered(["1101", "0c01", "0000"], "110")], "dft")
    each = [1, 1, 0], [0.75, 0.25, 0], [1, 1, 0], [0, 0.25, 0], [10, 11, 12]
    for name, values in zip(evaluate.NUMBERS, each, strict=True):
        assert number(row, name) == (pytest.approx(statistics.fmean(values)), error(values)), name
    head, line, _ = evaluate.table([row], "dft")
    assert "Average@4" in head and "- dft" not in head and line.split()[:3] == ["3", "sums", "dft"]
    row, = evaluate.compare([answered(["1"])], "dft")          # one number has no error
    assert number(row, "average")[0] == 1 and math.isnan(number(row, "average")[1])


def test_rows_are_over_seeds_and_differences_are_paired_in_the_same_unit():
    right = {"dft": {0: 2, 1: 3, 2: 4}, "cadft": {0: 3, 1: 5, 2: 6, 3: 6}, "hub/model": {None: 6},
             "other": {0: 6}, "sft": {9: 1}, "base": {0: 0}}   # of 8 samples, by seed
    marks = lambda n: ["1" * min(n, 4) + "0" * (4 - n), "1" * (n - 4) + "0" * min(8 - n, 4)]
    results = [answered(marks(n), "10", row=name, seed=seed)
               for name, some in right.items() for seed, n in some.items()]
    rows = {row["row"]: row for row in evaluate.compare(results, "dft")}
    assert list(rows) == ["base", "sft", "dft", "cadft", "hub/model", "other"]
    for name in "dft", "cadft":
        values = [n / 8 for n in right[name].values()]
        assert number(rows[name], "average") == (pytest.approx(statistics.fmean(values)), error(values))
    difference = {name: number(row, "average", "difference") for name, row in rows.items()}
    assert difference["cadft"] == (pytest.approx(5 / 24), error([1 / 8, 2 / 8, 2 / 8]))  # not seed 3
    assert difference["hub/model"] == (pytest.approx(3 / 8), error([4 / 8, 3 / 8, 2 / 8]))
    assert difference["other"] == (pytest.approx(0.5), error([1 - 0.5, 0.5 - 0]))          # over problems
    assert all(math.isnan(difference[name][0]) for name in ("dft", "sft"))
    assert "+20.8 ± 4.2" in "\n".join(evaluate.table(list(rows.values()), "dft"))


def test_rows_are_named_by_folders_and_what_is_no_seed_of_one_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, args in {"out/cadft-seed0": {"lr": 1, "seed": 0, "data_sha256": "a", "data": "x"},
                       "out/cadft-seed1": {"lr": 2, "seed": 1, "data_sha256": "b", "data": "y"},
                       "out/dft-seed0": {"lr": 1, "seed": 0, "out": "3"}, "out/mine": {},
                       "out/dft-seed12": {"lr": 1, "seed": 12, "out": "4"}, "else/mine": {}}.items():
        jsonl(Path(folder(name)) / "args.json", [args])
    Path("out/begun-seed0").mkdir()
    told = "row {}: not seeds of one experiment, they differ in {}\n"
    finished = [("cadft", 0), ("cadft", 1), ("dft", 0), ("dft", 12), ("mine", None)]
    assert [(run["row"], run["seed"]) for run in evaluate.find_runs([])] == finished
    assert capsys.readouterr().out == told.format("cadft", "data_sha256, lr")
    others = evaluate.find_runs(["else/mine/", "else/../else/mine", "Qwen/Qwen2-0.5B", "out/mine"])
    assert [run["row"] for run in others] == ["mine", "Qwen/Qwen2-0.5B", "mine"]
    assert capsys.readouterr().out == told.format("mine", "folder")
    for name in "out/begun-seed0", "out/nothing", "no/such/folder":
        with pytest.raises(train.Mistake, match=name):
            evaluate.find_runs([name])


@pytest.fixture(scope="module")
def evaluated(made):
    """A tiny run evaluated end to end: flags, file and rows."""
    pytest.importorskip("math_verify")
    sums = [{"question": f"{i}+{'1' * i}", "answer": i} for i in range(1, 5)]
    data = jsonl(made["path"] / "sums.jsonl", sums)
    flags = [str(made["one"]), "--data", data, "--samples", "2", "--max-tokens", "12", "--batch-size", "3"]
    return {"flags": flags, "file": made["one"] / "eval-sums.jsonl", "data": data,
            "rows": evaluate.measure(evaluate.parse(flags))}


def test_evaluation_end_to_end(evaluated, made, tmp_path, capsys):
    told = log(evaluated["file"].parent, "eval-sums.jsonl")
    asked = [(row["problem"], str(row["sample"])) for row in told]
    assert asked == [*itertools.product(range(4), ("0", "1", "greedy"))]
    assert all(row["tokens"] <= 12 and (row["finished"] or row["tokens"] == 12) for row in told)
    graded, = evaluate.measure(evaluate.parse(["--grade", str(evaluated["file"])]))    # its own file
    assert torch.equal(graded["values"], evaluated["rows"][0]["values"])
    more = jsonl(tmp_path / "more.jsonl", [{"question": "1+1", "answer": 2}])
    flags = "--data", evaluated["data"], more, "--limit", "2", "--out", str(tmp_path / "out")
    assert evaluate.main([made["model"], *evaluated["flags"], *flags]) == 0
    files = sorted(path.name for path in tmp_path.glob("out/*/*"))
    assert files == ["eval-more.jsonl"] * 2 + ["eval-sums.jsonl"] * 2
    assert len(log(tmp_path / "out", next(tmp_path.glob("out/*one/eval-sums.jsonl")))) == 2 * 3
    assert "asked in different words" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    hub = evaluated["rows"][0] | {"row": "hub", "runs": [{"path": "hub/model"}]}
    evaluate.draw(tmp_path / "picture.png", [*evaluated["rows"], hub])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ranks
def test_two_processes_write_the_same_evaluation(evaluated, tmp_path):
    command_line(*TORCHRUN, HERE / "evaluate.py", *evaluated["flags"], "--out", tmp_path / "two")
    file, = (path for path in (tmp_path / "two").rglob("*") if path.is_file())
    assert sorted(file.read_text().splitlines()) == sorted(evaluated["file"].read_text().splitlines())


@pytest.mark.parametrize("flags, template", (((), "{}:"), (("--prompt-template", "z{prompt}|"), "z{}|")))
def test_prompts_obey_the_template_and_cut_off_is_wrong(flags, template, evaluated, monkeypatch, tmp_path):
    def right(lm, prompts, stops, pad, limit, *how):           # the right answers, half of them cut off
        drawn.append(how)
        texts = [characters().decode(ids).replace(" ", "") for ids in prompts]
        seen.update(texts)
        numbers = [int(text.split("+")[0][-1]) for text in texts]
        return [[3 + n] + [2] * (n % 2) for n in numbers]
    seen, drawn = set(), []
    monkeypatch.setattr(cadft, "nucleus_sample", right)
    argv = [*evaluated["flags"], "--out", str(tmp_path), "--temperature", "0.6", "--top-p", "0.95", *flags]
    row, = evaluate.measure(evaluate.parse(argv))
    assert {how[:2] for how in drawn} == {(0.95, 0.0), (0.95, 0.6)}
    evaluate.measure(evaluate.parse([*argv, "--seed", "1"]))   # draws anew
    assert len(set(drawn)) == len(drawn)
    assert seen == {template.format(f"{i}+{'1' * i}") for i in range(1, 5)}
    assert [number(row, name)[0] for name in evaluate.NUMBERS[:4]] == [0.5] * 4


def test_a_missing_package_is_told_before_anything_is_sampled(evaluated, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("a model was loaded"))
    for module in "math_verify", "matplotlib", "matplotlib.figure":
        monkeypatch.setitem(sys.modules, module, None)
    refused(["pip install math-verify"], *evaluated["flags"], program=evaluate)
    refused(["pip install math-verify"], "--grade", evaluated["file"], program=evaluate)
    refused(["pip install matplotlib"], evaluated["flags"][0], "--plot", tmp_path / "x.png", program=evaluate)
    refused(["--against x: no such row"], evaluated["flags"][0], "--against", "x", program=evaluate)
    refused(["two files of one name"], *evaluated["flags"][:3], evaluated["data"], program=evaluate)
    refused(["--plot: a .png"], evaluated["flags"][0], "--plot", tmp_path / "x.doc", program=evaluate)


def test_answers_sampled_elsewhere_are_graded_and_grouped_and_verdicts_count_as_they_are(tmp_path):
    verdicts = [True, 1, "true", False, 0, "false", 0.0, 1.0]
    lines = [{"task_id": i % 2, "passed": verdict, "completion": "x"} for i, verdict in enumerate(verdicts)]
    row, = evaluate.measure(evaluate.parse(["--grade", jsonl(tmp_path / "code.jsonl", lines)]))
    assert number(row, "average")[0] == 0.5 and "2 code.jsonl" in evaluate.table([row], "dft")[1]
    pytest.importorskip("math_verify")
    lines = [{"question": "a", "answer": "1/2", "response": r"\boxed{0.5}"},
             {"question": "a", "answer": "1/2", "response": "0.5", "sample": "greedy"},
             {"question": "b", "reference": 3, "response": "3", "finish_reason": "length"},
             {"question": "b", "reference": 3, "response": "The answer is 3."}]
    row, = evaluate.measure(evaluate.parse(["--grade", jsonl(tmp_path / "told.jsonl", lines)]))
    assert [number(row, name)[0] for name in ("average", "any", "cut off")] == [0.75, 1, 0.25]
    assert "Average@1.5" in evaluate.table([row], "dft")[0]    # 3 samples of 2 problems


def test_the_gradient_study_is_that_of_direct_backwards(made, capsys):
    run, = evaluate.find_runs([made["one"]])
    found = evaluate.gradient_study(run, made["data"], 4)
    lm, tokenizer = train.load_model(made["one"], torch.float32)
    examples, _ = train.load_examples(train.parse([*map(str, made["flags"])]), tokenizer)
    batches = [train.collate([example]) for example in examples[:4]]
    nll = [naive_nll(lm, batch["input_ids"], batch["labels"])[0] for batch in batches]
    losses = {"sft": [n.mean() for n in nll], "dft": [(n.detach().neg().exp() * n).mean() for n in nll]}
    c_raw = [n.mean().item() for n in nll]
    mu, sigma = statistics.fmean(c_raw), statistics.pstdev(c_raw)
    w = [math.exp(-max(0, (c - mu) / sigma)) for c in c_raw]
    ranks = lambda x: [sorted(x).index(one) for one in x]
    expected = {"demonstrations": 4}
    for name, each in losses.items():
        parts = [torch.autograd.grad(loss, list(lm.parameters()), retain_graph=True) for loss in each]
        norms = [math.hypot(*(part.norm().item() for part in some)) for some in parts]
        weighted = [(weight * norm) ** 2 for weight, norm in zip(w, norms)]
        r, rho = statistics.correlation(c_raw, norms), statistics.correlation(ranks(c_raw), ranks(norms))
        expected |= {f"c_hat and ||g|| of {name}, Pearson": r, f"c_hat and ||g|| of {name}, Spearman": rho,
                     f"E||w g||^2 / E||g||^2 of {name}": sum(weighted) / sum(norm ** 2 for norm in norms)}
    assert found == pytest.approx(expected, rel=1e-4)
    run, = evaluate.find_runs([made["one"]], "z{prompt}")
    assert evaluate.gradient_study(run, made["data"], 4) != pytest.approx(expected, rel=1e-4)
    assert evaluate.main([str(made["one"]), "--gradients", "--data", made["data"], "--limit", "3"]) == 0
    assert "E||w g||^2" in capsys.readouterr().out
