"""Fine-tune a causal language model with CADFT; or with SFT, DFT, weighted SFT or focal loss, to compare.

    python train.py                                              the classroom: no download, no GPU needed
    python train.py --model MODEL --data FILE.jsonl              your own model and demonstrations
    torchrun --nproc-per-node=8 train.py --model ... --data ...  the same result on eight processes

Where this loop departs from the textbook:
 1. A step is one forward of all micro-batches, graphs kept, then one backward: c_hat needs every score of the
    global batch before the first gradient, and this way the model runs only once, and exactly.
 2. All methods take the same path; they differ in the token loss and in beta (0: no weighting).
 3. A step's data and random numbers depend on (seed, step) alone: not on the number of ranks, the size of the
    micro-batches, or what went before. So a resumed run is the uninterrupted one.
 4. Weights are float32; bfloat16 is autocast over them. Dropout is off: it would depend on the sharding.
 5. A mistake in the input ends in one line where it is found (`refuse`, `explained`); `guarded` says it once.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import dropwhile, islice
from pathlib import Path

for setting in "THP_MEM_ALLOC_ENABLE=1", "OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=10000":
    os.environ.setdefault(*setting.split("="))     # read as torch loads: large pages, threads that yield
import torch
import torch.distributed as dist
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cadft

# method: token loss, and whether samples are weighted and rewritten
METHODS = {"sft": (cadft.sft_loss, False), "focal": (cadft.focal_loss, False), "dft": (cadft.dft_loss, False),
           "casft": (cadft.sft_loss, True), "cadft": (cadft.dft_loss, True)}
KINDS = ["wrong", "cipher", "terse", "junk"]           # of the classroom's incompatible demonstrations
MANY = 10 ** 12
# flag, value for your own model (the paper's), the classroom's, allowed (an interval or choices), help
FLAGS = [
    ("model", "", "", None, "a Hugging Face folder or hub name; with --data"),
    ("data", "", "", None, "a JSONL file; with --model"),
    ("out", "", "", None, "output folder (out/<method>-seed<seed>)"),
    ("method", "cadft", "cadft", METHODS, "token loss and weighting"),
    ("resume", False, False, None, "go on from the checkpoint in --out, if there is one"),
    ("prompt-field", "prompt", "prompt", None, "JSONL field of the prompt"),
    ("response-field", "response", "response", None, "JSONL field of the response"),
    ("prompt-template", "{prompt}", "{prompt}", None, 'wraps each prompt: "{prompt} Reason step by step."'),
    ("dtype", "", "", ["float32", "bfloat16", "float64"], "(bfloat16 with --model on CUDA, else float32)"),
    ("gradient-checkpointing", True, False, None, "recompute activations in the backward pass"),
    ("beta", 1.0, 1.0, (0.0, 1e9), "w = exp(-beta max(0, c_hat)); 0: all weights are 1"),
    ("eps", 1e-6, 1e-6, (1e-30, 1e9), "added to the standard deviation of the z-score"),
    ("ema-decay", 0.5, 0.5, (0.0, 0.9999), "of the moving average of c_hat (paper silent)"),
    ("rewrite-after", 3000, 60, (0, MANY), "T_warm: no rewriting before this step"),
    ("rewrite-every", 1000, 6, (0, MANY), "K: steps between rewriting rounds; 0: no rewriting"),
    ("rewrite-fraction", 0.005, 0.005, (1e-9, 1.0), "share of the data set that a round may pick"),
    ("rewrite-prob", 0.5, 0.5, (0.0, 1.0), "probability that a picked example is rewritten"),
    ("rewrite-top-p", 0.9, 0.9, (0.001, 1.0), "nucleus of a rewrite"),
    ("rewrite-temperature", 0.7, 0.7, (0.001, 1000.0), "temperature of a rewrite"),
    ("rewrite-max-tokens", 2048, 96, (1, MANY), "length limit of a rewrite (paper silent)"),
    ("steps", 0, 300, (0, MANY), "optimizer steps; 0: as many as --epochs makes"),
    ("epochs", 1, 1, (1, MANY), "instead of --steps: passes over the data"),
    ("batch-size", 256, 32, (1, MANY), "|B|: the effective global batch, of all ranks together"),
    ("micro-batch-tokens", 16384, 8192, (1, MANY), "padded tokens of one forward; changes no result"),
    ("max-length", 2048, 128, (2, MANY), "tokens of prompt and response; longer responses are cut"),
    ("lr", 5e-5, 1e-4, (1e-30, 1e38), "peak learning rate"),
    ("warmup-ratio", 0.1, 0.1, (0.0, 1.0), "share of the steps that warm up; then a cosine towards 0"),
    ("weight-decay", 0.01, 0.0, (0.0, 1e9), "of AdamW"),
    ("clip", 1.0, 1.0, (1e-30, math.inf), "largest gradient norm"),
    ("seed", 0, 0, (0, 10 ** 9), "decides order, rewrites, and everything in the classroom"),
    ("save-every", 500, 100, (1, MANY), "steps between checkpoints"),
    ("classroom-size", None, 640, (1, 100_000), "demonstrations in the classroom"),
    ("classroom-digits", None, 3, (2, 6), "digits of the numbers to add; the base model knows 1 to 3"),
    ("incompatible", None, 0.4, (0.0, 1.0), "share of incompatible demonstrations in the classroom"),
    ("carries", None, 0, (0, 6), "incompatible demonstrations fall on sums with so many carries or more"),
    ("kinds", None, KINDS, KINDS, "of incompatible demonstrations"),
]
# what may differ between a run and its continuation: it changes no result (of data, the content counts)
FREE = {"out", "data", "resume", "save_every", "micro_batch_tokens", "gradient_checkpointing"}
CUDA = torch.cuda.is_available()
PLACES = "RANK", "LOCAL_RANK", "WORLD_SIZE"
TORCHRUN = os.environ.keys() >= {*PLACES, "MASTER_ADDR", "MASTER_PORT"}
RANK, LOCAL_RANK, WORLD = (int(os.environ[name]) for name in PLACES) if TORCHRUN else (0, 0, 1)
DEVICE = torch.device("cuda", LOCAL_RANK) if CUDA else torch.device("cpu")
say = partial(print, sep="\n", flush=True) if RANK == 0 else lambda *lines: None


@dataclass(slots=True)
class Example:
    """One demonstration as token ids. The response ends with end-of-sequence, unless it was cut."""
    index: int
    prompt_ids: torch.Tensor    # [tokens], int32
    response_ids: torch.Tensor  # [|y|], int32
    kind: str | None = None     # a label for logs and tables; training never looks at it

    def __len__(self):
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class Run:
    """What a run is made of. Everything that changes is in its checkpoint."""
    args: argparse.Namespace
    lm: torch.nn.Module
    tokenizer: object
    examples: list
    optimizer: torch.optim.Optimizer
    tracker: cadft.CompatibilityEMA
    per_epoch: int              # steps of an epoch; the last, short batch is dropped (paper silent)
    step: int = 0               # steps done; in the loop: the one at work
    seconds: float = 0.0
    rewrites: dict = field(default_factory=dict)    # index -> the response ids that replaced the original's
    logs: dict = field(default_factory=lambda: {"log.jsonl": [], "rewrites.jsonl": []})     # what is in them
    signal: int = 0             # the number of the one that asks the run to stop


# ==== 1. The loop ===========================================================================================

def train_step(run, net, batches):
    """One optimizer step on this rank's micro-batches: the algorithm, whole.

    Returns columns {name: [G]} about the global batch, float64 on the CPU, the same on every rank.
    """
    a, outputs = run.args, []
    for batch in batches:                           # DDP prepares its one reduction in the last forward
        net.require_backward_grad_sync = batch is batches[-1]
        outputs.append(net(batch["input_ids"], batch["labels"]))               # nll, mask: [rows, T-1]
    per_sample = lambda score: torch.cat([score(nll, mask) for nll, mask in outputs])
    token_loss, weighted = METHODS[a.method]

    c_raw = per_sample(cadft.compatibility)                                    # [B]
    c_hat = cadft.batch_zscore(c_raw, a.eps)                                   # [B]
    w = cadft.compatibility_weight(c_hat, a.beta if weighted else 0.0)         # [B]
    loss = per_sample(token_loss)                                              # [B]
    cadft.cadft_loss(loss, w).backward()

    grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), a.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    columns = {"index": torch.cat([batch["index"] for batch in batches]), "c_raw": c_raw, "c_hat": c_hat,
               "w": w, "loss": loss, "dft": per_sample(cadft.dft_loss), "grad_norm": grad_norm,
               "memory": torch.tensor(peak_memory()), "signal": torch.tensor(run.signal)}
    rows = [x.detach().to(c_raw.device, torch.float64).expand(len(c_raw)) for x in columns.values()]
    return dict(zip(columns, cadft.gather(torch.stack(rows, dim=1)).cpu().T))


def train(run, until=lambda run: False):
    """The loop over steps: train, average, log, rewrite, save. Returns 0, or 128 + the signal it obeyed."""
    a, began = run.args, time.perf_counter() - run.seconds
    done, stopped = run.step == a.steps, 0
    net = ResponseNLL(run.lm, a.dtype == "bfloat16")
    if dist.is_initialized():
        net = torch.nn.parallel.DistributedDataParallel(
            net, [DEVICE] if CUDA else None, forward_sync_buffers=False, gradient_as_bucket_view=True)
    note_signals(run)
    bar = tqdm(total=a.steps, initial=run.step, desc=Path(a.out).name, unit="step", disable=RANK > 0 or None)
    while not done and not stopped:
        run.step, start = run.step + 1, time.perf_counter()
        torch.manual_seed(key(a.seed, run.step))        # should the model draw anything (a noisy router)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, a)
        table = train_step(run, net, [collate(rows) for rows in share(run, *joined())])
        bad = sorted(table["index"][~table["loss"].isfinite()].int().tolist())
        refuse(bad or not table["grad_norm"].isfinite().all(),
               f"loss or gradient is not finite at step {run.step}, examples {bad[:8] or 'all'}: look at "
               f"these, or try a lower --lr; the last checkpoint is untouched")
        run.tracker.update(table["index"].long(), table["c_hat"])
        run.seconds = time.perf_counter() - began
        row = log_row(run, table, time.perf_counter() - start)
        append(run, "log.jsonl", [row])
        bar.set_postfix({name: f"{row[name]:.3g}" for name in ("loss", "nll", "w_mean", "rewritten")})
        bar.update()
        if run.step in rewriting_steps(run):
            rewrite(run)
        done = run.step == a.steps or until(run)
        stopped = int(table["signal"].max()) * (not done)       # of any rank: all stop after the same step
        if RANK == 0 and (done or stopped or run.step % a.save_every == 0):
            save(run)
    bar.close()
    if stopped:
        say(f"stopped by signal {stopped} after step {run.step}; --resume goes on from there")
    return 128 + stopped if stopped else 0


class ResponseNLL(torch.nn.Module):
    """token_nll as a module, which DDP needs. Padding stands on the right, so there is no attention mask."""

    def __init__(self, lm, bfloat16):
        super().__init__()
        self.lm, self.bfloat16 = lm, bfloat16

    def forward(self, input_ids, labels):
        """[rows, T] -> nll, mask [rows, T-1]. A GPU wants larger chunks."""
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bfloat16):
            return cadft.token_nll(self.lm, input_ids, None, labels, chunk=2048 if CUDA else 512)


def learning_rate(step, a):
    """lr min(1, t / warm-up steps), then lr times the cosine that would be 0 at t = steps + 1; t from 1."""
    warm = round(a.warmup_ratio * a.steps)
    progress = max(0, step - 1 - warm) / max(1, a.steps - warm)
    return a.lr * min(1, step / max(1, warm)) * 0.5 * (1 + math.cos(math.pi * progress))


def share(run, rank, world):
    """One rank's micro-batches of a step, as lists of examples; every rank has as many, of like lengths."""
    a, (epoch, position) = run.args, divmod(run.step - 1, run.per_epoch)
    generator = torch.Generator().manual_seed(key(a.seed, "epoch", epoch))
    order = torch.randperm(len(run.examples), generator=generator)[position * a.batch_size:][:a.batch_size]
    rows, batches = sorted((run.examples[i] for i in order.tolist()), key=len, reverse=True), []
    for deal in (rows[i:i + world] for i in range(0, len(rows), world)):        # to each rank one, like cards
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0][0]) > a.micro_batch_tokens:
            batches.append([])                      # its first deal's first row, the longest, sets its width
        batches[-1].append(deal)
    return [[deal[rank] for deal in batch] for batch in batches]


def collate(rows):
    """Examples -> {input_ids, labels [B, T], index [B]}; padded on the right with 0, which no token sees."""
    ids = [torch.cat([e.prompt_ids, e.response_ids]) for e in rows]
    labels = [torch.cat([torch.full_like(e.prompt_ids, cadft.IGNORE), e.response_ids]) for e in rows]
    batch = {"input_ids": pad_sequence(ids, batch_first=True), "index": torch.tensor([e.index for e in rows]),
             "labels": pad_sequence(labels, batch_first=True, padding_value=cadft.IGNORE)}
    return {name: value.long().to(DEVICE) for name, value in batch.items()}


def log_row(run, table, elapsed):
    """One line of log.jsonl: numbers of the global batch. nll is per token, c_mean per sample."""
    w, c_raw = table["w"], table["c_raw"]
    examples = [run.examples[i] for i in table["index"].int().tolist()]
    length = torch.tensor([len(e.response_ids) for e in examples])             # [G] |y|
    kind_of = [e.kind and ("rewritten" if e.index in run.rewrites else e.kind) for e in examples]
    kinds = {kind: torch.tensor([k == kind for k in kind_of]) for kind in sorted({*kind_of} - {None, ""})}
    means = lambda at: {name: table[name][at].mean().item() for name in ("c_raw", "c_hat", "w")}
    return {"step": run.step, "epoch": (run.step - 1) // run.per_epoch + 1, "seconds": run.seconds,
            "lr": learning_rate(run.step, run.args), "loss": (w * table["loss"]).mean().item(),
            "nll": ((c_raw * length).sum() / length.sum()).item(), "dft": table["dft"].mean().item(),
            "c_mean": c_raw.mean().item(), "c_std": c_raw.std(correction=0).item(), "w_mean": w.mean().item(),
            "w_min": w.min().item(), "down_weighted": (w < 1).double().mean().item(),
            "grad_norm": table["grad_norm"][0].item(), "tokens_per_second": sum(map(len, examples)) / elapsed,
            "peak_memory": int(table["memory"].max()), "rewritten": len(run.rewrites),
            "kinds": {kind: {"n": int(at.sum())} | means(at) for kind, at in kinds.items()}}


# ==== 2. Rewriting ==========================================================================================

def rewriting_steps(run):
    """The steps t that a round follows: t >= T_warm, (t - T_warm) mod K = 0 (paper silent: where K starts),
    and after the first epoch, in which nothing is seen twice."""
    first, every = run.args.rewrite_after, run.args.rewrite_every
    if not METHODS[run.args.method][1] or not every:
        return range(0)
    return range(first, run.args.steps + 1, every)[math.ceil(max(0, run.per_epoch + 1 - first) / every):]


def rewrite(run, chunk=64):
    """One round: pick, toss, sample, write back, record. Chunks and their seeds don't depend on the ranks."""
    a, stops = run.args, eos_ids(run.lm, run.tokenizer)
    text = lambda ids: run.tokenizer.decode(ids, skip_special_tokens=True)
    picked = run.tracker.pick(a.rewrite_fraction)
    drawn = [i for i in picked if random.Random(key(a.seed, run.step, i)).random() < a.rewrite_prob]
    drawn.sort(key=lambda i: (len(run.examples[i].prompt_ids), i))
    (rank, world), new, rows = joined(), {}, []
    for start in range(rank * chunk, len(drawn), world * chunk):
        some = drawn[start:start + chunk]
        prompts = [run.examples[i].prompt_ids.tolist() for i in some]
        room = max(1, min(a.rewrite_max_tokens, a.max_length - len(prompts[-1])))      # the longest prompt's
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=a.dtype == "bfloat16"):
            new |= zip(some, cadft.nucleus_rewrite(
                run.lm, prompts, stops, stops[0], room, top_p=a.rewrite_top_p,
                temperature=a.rewrite_temperature, seed=key(a.seed, run.step, "chunk", start // chunk)))
    new = {i: ids for part in gather_objects(new) for i, ids in part.items()}
    for i in picked:
        e, ids = run.examples[i], new.get(i)
        kept = ("not drawn" if ids is None else "cut off" if ids[-1] not in stops else
                "empty" if not text(ids).strip() else None)
        rows.append({"step": run.step, "index": i, "kind": e.kind, "average": run.tracker.mean[i].item(),
                     "prompt": text(e.prompt_ids), "old": text(e.response_ids),
                     "kept" if kept else "new": kept or text(ids)})
        if not kept:
            run.rewrites[i] = e.response_ids = torch.tensor(ids, dtype=torch.int32)
            run.tracker.forget(i)
    append(run, "rewrites.jsonl", rows)


# ==== 3. Data ===============================================================================================

def load_examples(a, tokenizer, rows=None):
    """Examples of the JSONL file, or of `rows` like its. What is cut or dropped for --max-length is told."""
    examples, cut, dropped = [], 0, 0
    rows = rows or (read_jsonl(a.data) if a.data else classroom_rows(a))
    while some := list(islice(rows, 1000)):                     # tokenizers are fast on many texts at once
        turns, responses = zip(*(dialogue(row, a, where) for where, row in some))
        prompts = encode_prompts(tokenizer, turns, [where for where, _ in some])
        answers = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
        for (where, row), prompt, answer in zip(some, prompts, answers):
            refuse(not (prompt and answer), f"{where}: there is no token; is it the model's own tokenizer?")
            answer = answer if answer[-1] == tokenizer.eos_token_id else [*answer, tokenizer.eos_token_id]
            kept = answer[:max(0, a.max_length - len(prompt))]
            dropped, cut = dropped + (not kept), cut + (0 < len(kept) < len(answer))
            if kept:
                prompt, kept = (torch.tensor(ids, dtype=torch.int32) for ids in (prompt, kept))
                kind = None if row.get("kind") is None else str(row["kind"])
                examples.append(Example(len(examples), prompt, kept, kind))
    if cut or dropped:
        say(f"{cut:,} responses cut at {a.max_length} tokens, {dropped:,} prompts left no room for one")
    return examples or sys.exit(f"{a.data or 'the classroom'}: no usable row")


def read_jsonl(path):
    """Yield ("file, line n", row) for each line that is not blank."""
    with open(path, "rb") as file:                              # bytes: only \n ends a line
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            with explained(f"{where}: not valid JSON in UTF-8, one object a line"):
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").strip() or "null")
                json.dumps(row, ensure_ascii=False).encode()    # half a surrogate pair is no text
            if line.strip():
                refuse(not isinstance(row, dict), f"{where}: an object is needed, not {type(row).__name__}")
                yield where, row


def dialogue(row, a, where):
    """(turns before the response, response) of one row: the named fields, or else `messages`."""
    fields = a.prompt_field, a.response_field
    if fields != ("prompt", "response") or "messages" not in row or row.keys() >= {*fields}:
        turns = [{"role": who, "content": row.get(name)} for who, name in zip(("user", "assistant"), fields)]
        names = [f'field "{name}"' for name in fields]
    else:
        turns = row["messages"] if isinstance(row["messages"], list) else []
        turns = turns if all(isinstance(turn, dict) and "role" in turn for turn in turns) else []
        while turns and turns[-1]["role"] != "assistant":
            turns = turns[:-1]
        refuse(len(turns) < 2, f'{where}: "messages" needs an assistant turn after a user turn, with roles')
        names = [f"message {i}" for i in range(1, len(turns) + 1)]
    for turn, name in zip(turns, names):
        refuse(not isinstance(turn.get("content"), str) or not turn["content"],
               f"{where}: {name} is missing, empty or not a string; see --prompt-field and the like")
    *before, question, response = turns
    asked = a.prompt_template.replace("{prompt}", question["content"])
    return [*before, question | {"content": asked}], response["content"]


def encode_prompts(tokenizer, dialogues, wheres):
    """Token ids of prompts: by the chat template, else the text as it is. One bos, where there is a bos."""
    texts, bos = [], tokenizer.bos_token_id
    today = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"       # or prompts change overnight
    for turns, where in zip(dialogues, wheres):
        refuse(not tokenizer.chat_template and len(turns) > 1,
               f"{where}: {len(turns)} turns before the response, but no chat template")
        with explained(f"{where}: the chat template refuses these turns"):
            texts.append(tokenizer.apply_chat_template(
                turns, chat_template=today + tokenizer.get_chat_template(), tokenize=False,
                add_generation_prompt=True) if tokenizer.chat_template else turns[0]["content"])
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]          # a template may write bos too
    return [ids if bos is None else [bos, *dropwhile(lambda i: i == bos, ids)] for ids in prompts]


# ==== 4. Model and processes ================================================================================

def load_model(path, dtype):
    """(model in training mode without dropout, tokenizer) of a folder or a hub name."""
    with explained(f"{path}: no causal language model with its tokenizer could be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        config = transformers.AutoConfig.from_pretrained(path)
        refuse(getattr(config, "vision_config", None) or config.is_encoder_decoder,
               f"{path}: reads pictures or has an encoder: this one is for text; see the README")
        for part in (config, config.get_text_config()):
            vars(part).update({name: 0.0 for name, value in vars(part).items()
                               if "drop" in name and isinstance(value, float)})
        lm, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True)
        for tensor in (*lm.parameters(), *lm.buffers()):        # a mapped file is aligned otherwise than
            tensor.data = tensor.data.clone()                   # torch's memory: some processors round so too
        cadft.plain_head(lm.to(DEVICE).train())                 # refuses what is not causal
    refuse(info["missing_keys"], f"{path}: weights are missing: {sorted(info['missing_keys'])[:3]}")
    refuse(tokenizer.eos_token_id is None, f"{path}: its tokenizer has no end-of-sequence token")
    refuse(not finite(lm), f"{path}: its weights are not finite")
    return lm, tokenizer


def finite(lm):
    """Whether all weights of a model are finite numbers."""
    return all(p.isfinite().all() for p in lm.parameters())


def eos_ids(lm, tokenizer):
    """All ids that end a response: the tokenizer's, and those of the model's generation settings."""
    own = lm.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *([] if own is None else own if isinstance(own, list) else [own])})


def positions(lm):
    """How many tokens the model takes."""
    return getattr(lm.config.get_text_config(), "max_position_embeddings", None) or MANY


def key(*parts):
    """A seed made of several things, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def join():
    """Join torchrun's processes, if it started us, and wait until all have: nccl on CUDA, else gloo."""
    if CUDA:
        refuse(LOCAL_RANK >= torch.cuda.device_count(), "more processes than GPUs: lower --nproc-per-node")
        torch.cuda.set_device(DEVICE)
    if TORCHRUN:
        store, *_ = next(dist.rendezvous("env://"))
        # torchrun may keep its store when it restarts workers: lost ones' addresses must not be found there
        store = dist.PrefixStore("try " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if CUDA else "gloo", store=store, rank=RANK, world_size=WORLD,
                                timeout=timedelta(hours=2))     # some wait while others sample
        gather_objects(None)                # nccl does not meet in joining, but in the first communication


def joined():
    """(rank, processes) among those that have joined; alone before, as rank 0 is while it makes a base."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_objects(value):
    """A list with every rank's value."""
    values = [value] * joined()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def refuse(wrong, why):
    """Where something is wrong, end with a line that says why; `guarded` prints it."""
    if wrong:
        sys.exit(why)


@contextlib.contextmanager
def explained(meaning):
    """Whatever goes wrong in here ends in one line: what that means, and the error's own words."""
    try:
        yield
    except torch.OutOfMemoryError:                              # `guarded` knows better
        raise
    except Exception as error:                                  # libraries have many kinds of their own
        sys.exit(f"{meaning} ({error})")


def guarded(program):
    """program(argv) as a main function that returns the exit code: 0, 2 (a mistake), or 128 + signal."""
    def main(argv=None):
        """The program on these arguments, or on the command line's."""
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with contextlib.suppress(AttributeError):               # a notebook's has no such method
            sys.stdout.reconfigure(errors="replace")            # a terminal may know ASCII only
        try:
            end = program(argv) or 0
        except SystemExit as exit_:
            end = exit_.code
        except KeyboardInterrupt:                               # outside the loop: nothing to save
            end = 130
        except OSError as error:
            end = str(error)
        except torch.OutOfMemoryError:
            end = ("out of memory; micro-batches do not bound what one forward of the step keeps: take more "
                   "processes, --gradient-checkpointing, a smaller --max-length or --batch-size")
        if isinstance(end, str):
            # mistakes mostly meet every process: a node's first one speaks, and torchrun ends the others as
            # they wait; one that is still there was alone with its mistake, and speaks too
            time.sleep(10 * (LOCAL_RANK > 0))
            print("error:", " ".join(end.split())[:450], file=sys.stderr, flush=True)
            end = 2
        with contextlib.suppress(OSError, AttributeError):      # nobody may be listening
            sys.stdout.flush()
        return end
    return main


def peak_memory():
    """Bytes: CUDA's peak allocation, else the process's peak resident size; 0 where the system can't tell."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):
        import resource                                         # Unix only
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def note_signals(run):
    """SIGTERM and Ctrl-C finish the step and save; once more, after two seconds, ends the process at once."""
    def note(number, _):
        """What the system calls when a signal comes."""
        times.append(time.monotonic())
        run.signal = run.signal or number
        if times[-1] - times[0] > 2:                            # torchrun repeats the signal
            os._exit(128 + number)
    times = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


# ==== 5. Nothing lost =======================================================================================

def writing(path, then="the last checkpoint is safe: make room, and --resume goes on from it"):
    """For what writes a file; rank 0 alone comes here."""
    return explained(f"{path}: can't be written; {then}")


def finished(out):
    """Whether a run's folder holds the final model: its checkpoint goes last."""
    return Path(out, "config.json").exists() and not Path(out, "checkpoint.pt").exists()


def save(run):
    """The checkpoint, written beside the old one, and renamed over it when it is on disk. Rank 0 alone."""
    refuse(not finite(run.lm),
           f"weights are not finite after step {run.step}: try a lower --lr; no checkpoint was touched")
    path, draft = Path(run.args.out, "checkpoint.pt"), Path(run.args.out, "checkpoint.tmp")
    state = {name: getattr(run, name) for name in ("step", "seconds", "rewrites", "logs")}
    state |= {name: getattr(run, name).state_dict() for name in ("lm", "optimizer", "tracker")}
    with writing(path):
        with open(draft, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())                             # on disk, not in a cache
        os.replace(draft, path)


def restore(run):
    """Go on from the checkpoint, if there is one; the logs become what it says, since later steps run again.
    State is copied into a model loaded as at a fresh start, so memory lies as if never interrupted."""
    path = Path(run.args.out, "checkpoint.pt")
    with explained(f"{path}: damaged; restore it, or name another --out"):
        for name, value in torch.load(path, map_location="cpu").items() if path.exists() else ():
            if name in ("lm", "optimizer", "tracker"):
                getattr(run, name).load_state_dict(value)
            else:
                setattr(run, name, value)
    for i, ids in run.rewrites.items():
        run.examples[i].response_ids = ids
    if RANK == 0:
        with writing(f"--out {path.parent}", "name another one"):
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "args.json").touch(exist_ok=run.args.resume)     # of two, one fails here
            if not path.exists():
                write_json(path.parent / "args.json", vars(run.args))
        for name, rows in run.logs.items():
            write_rows(path.parent / name, rows, "w")


def append(run, name, rows):
    """Add rows to one of the run's logs."""
    run.logs[name] += rows
    if RANK == 0:
        write_rows(Path(run.args.out, name), rows, "a")


def write_rows(path, rows, mode):
    """Rows as a JSONL file, or at the end of one."""
    with writing(path), open(path, mode, encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(path, value):
    """Write a JSON file beside the old one, and rename it."""
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def read_json(path):
    """The object in a JSON file; {} where there is none."""
    with explained(f"{path}: damaged; restore or remove it"):
        return dict(json.loads(path.read_text("utf-8") or "{}")) if path.exists() else {}


def finish(run):
    """Rank 0: make --out an ordinary Hugging Face folder; the checkpoint goes only when that is on disk."""
    out = Path(run.args.out)
    with writing(out):
        run.lm.save_pretrained(out)
        run.tokenizer.save_pretrained(out)
        for path in filter(Path.is_file, out.rglob("*")):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        (out / "checkpoint.pt").unlink()


# ==== 6. From the command line ==============================================================================

def read_flags(argv, flags, doc, own, runs=False):
    """(all values, the names given). Flags not given take the classroom's value, or the usual one where the
    flag `own` is given."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.error = lambda message: sys.exit(f"{message}; see --help")
    if runs:
        parser.add_argument("runs", nargs="*", default=[], metavar="RUN", help="folders or hub names, first")
    for flag, usual, classroom, allowed, text in flags:
        kind, choices = type(classroom), None if isinstance(allowed, tuple) else allowed
        more = ({"action": argparse.BooleanOptionalAction} if kind is bool else
                {"nargs": "+", "choices": choices} if kind is list else {"type": kind, "choices": choices})
        shown = f"{classroom}" if usual in (None, classroom) else f"{usual}, in the classroom {classroom}"
        parser.add_argument(f"--{flag}", help=text + f" ({shown})" * (classroom not in ("", [])), **more)
    given = vars(parser.parse_args(argv))
    column = 1 if given.get(own) else 2
    for flag, usual, _, allowed, _ in flags:
        value = given.get(flag.replace("-", "_"))
        if value is not None and isinstance(allowed, tuple):
            low, high = allowed
            refuse(not low <= value <= high, f"--{flag} must lie between {low} and {high}, got {value}")
        refuse(value is not None and column == 1 and usual is None,
               f"--{flag} belongs to the classroom: leave out --{own}")
    values = {row[0].replace("-", "_"): row[column] for row in flags}
    return argparse.Namespace(**values | given), given.keys()


def parse(argv):
    """The arguments, with the paper's values (your own model) or the classroom's in place of unset ones."""
    a, given = read_flags(argv, FLAGS, __doc__, "model")
    refuse(bool(a.model) != bool(a.data), "--model and --data go together; with neither, the classroom runs")
    refuse(given >= {"steps", "epochs"}, "--steps and --epochs exclude each other")
    refuse("{prompt}" not in a.prompt_template, "--prompt-template: the prompt is lost without its {prompt}")
    a.steps = 0 if "epochs" in given else a.steps
    a.model = os.path.realpath(a.model) if os.path.isdir(a.model) else a.model
    a.out = a.out or f"out/{a.method}-seed{a.seed}"
    a.dtype = a.dtype or ("bfloat16" if CUDA and a.model else "float32")
    return a


@guarded
def main(argv):
    """train.py. Rank 0 makes the base model, if there is none yet; the others wait for it to join them."""
    a = parse(argv)
    out, base = Path(a.out), Path(a.out).parent / f"base-seed{a.seed}"
    refuse(a.batch_size % WORLD, f"--batch-size {a.batch_size}: not a multiple of the {WORLD} processes")
    if not a.model:
        torch.set_num_threads(THREADS)
    if RANK == 0:
        ours = (out / "args.json").exists()
        refuse(not ours and (out.exists() and any(out.iterdir()) or out.name.startswith("base-seed")),
               f"--out {out} is no run but not empty, or a name for base models: name another one")
        refuse(ours and not a.resume, f"--out {out} holds a run: --resume goes on; or name another one")
        if not a.model and not finished(base):
            make_base(a, base)
    join()
    lm, tokenizer = load_model(a.model or base, torch.float64 if a.dtype == "float64" else torch.float32)
    run = new_run(a, lm, tokenizer, load_examples(a, tokenizer))
    if finished(out):
        return say(f"{out} holds a finished run; nothing to do")
    restore(run)
    describe(run)
    code = train(run)
    if code == 0 and RANK == 0:
        finish(run)
        report(run)
    return code


def new_run(a, lm, tokenizer, examples):
    """A run at its beginning, once what can be known to fail before the first step is checked."""
    n, texts = len(examples), [ids for e in examples for ids in (e.prompt_ids, e.response_ids)]
    token, known = max(int(ids.max()) for ids in texts), len(lm.get_input_embeddings().weight)
    refuse(a.max_length > positions(lm), f"--max-length {a.max_length}: the model takes {positions(lm)}")
    refuse(a.batch_size > n, f"--batch-size {a.batch_size}: there are only {n} usable examples")
    refuse(token >= known, f"the data has token {token}, the model only {known}: is it its tokenizer?")
    content = hashlib.sha256()
    for ids in texts:
        content.update(b"%d:" % len(ids) + ids.numpy().tobytes())
    a.steps, a.data_sha256 = a.steps or a.epochs * (n // a.batch_size), content.hexdigest()
    found = a.data_sha256, finished(a.out), Path(a.out, "checkpoint.pt").exists()
    refuse(len(set(gather_objects(found))) > 1,
           "the processes differ in their data, or in what --out holds: give all nodes the same files")
    saved = read_json(Path(a.out, "args.json")) if any(found[1:]) else vars(a)
    differ = [f"--{name.replace('_', '-')} (was {saved.get(name)}, is {value})"
              for name, value in vars(a).items() if name not in FREE and saved.get(name) != value]
    refuse(differ, f"{a.out} holds another run; it differs in {', '.join(differ)}: name another --out")
    if a.gradient_checkpointing:
        with explained(f"{a.model}: try --no-gradient-checkpointing"):
            lm.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=a.weight_decay, fused=True)
    tracker = cadft.CompatibilityEMA(n, a.ema_decay)
    return Run(a, lm, tokenizer, examples, optimizer, tracker, n // a.batch_size)


def describe(run):
    """Say what the run will do."""
    a, rounds, size = run.args, rewriting_steps(run), sum(p.numel() for p in run.lm.parameters())
    when = (f"{len(rounds):,} rounds, after step {rounds[0]} and every {rounds.step} from there" if rounds
            else f"can't happen with {a.method}, T_warm {a.rewrite_after}, K {a.rewrite_every}, and no "
                 f"example seen twice before step {run.per_epoch + 1}")
    say(f"{a.method} on {a.model or 'the classroom base model'}, {size:,} parameters, {a.dtype}",
        f"{len(run.examples):,} examples, {a.steps:,} steps of {a.batch_size} ({run.per_epoch:,} an epoch) "
        f"on {DEVICE.type} x {WORLD}", f"rewriting: {when}")
    if not cadft.plain_head(run.lm):
        say("this model alters its logits after the projection: they are kept whole, which takes memory")


def report(run):
    """Say what happened; by kind of demonstration where kinds are known."""
    log, audit = run.logs.values()
    first, last = ([row for row in log if row["epoch"] == log[i]["epoch"]] for i in (0, -1))
    for kind in sorted({kind for row in last for kind in row["kinds"]}):
        seen = [row["kinds"][kind] for row in last if kind in row["kinds"]]
        c_raw, c_hat, w = (sum(k["n"] * k[name] for k in seen) / sum(k["n"] for k in seen)
                           for name in ("c_raw", "c_hat", "w"))
        new = sum(row["kind"] == kind and "new" in row for row in audit)
        say(f"  {kind:9}  c_raw {c_raw:6.3f}  c_hat {c_hat:5.2f}  w {w:4.2f} in the last epoch; "
            f"{new} rewritten in all")
    nll = [sum(row["nll"] for row in rows) / len(rows) for rows in (first, last)]
    new = sum("new" in row for row in audit)
    say(f"nll {nll[0]:.3f} in the first epoch, {nll[1]:.3f} in the last; {new} rewrites, "
        f"{len(audit) - new} picked but kept; {run.seconds:.0f} s",
        f"model: {run.args.out}    evaluate it: python evaluate.py {run.args.out}")


# ==== 7. The classroom ======================================================================================

BASE = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=128, initializer_range=0.08, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0})     # 10000 is for longer texts
# the base model's run: on its own corpus, from random weights, until this share of sums is right
BASE_RUN = dict(method="sft", steps=1200, lr=2e-3, warmup_ratio=0.04, weight_decay=0.01, dtype="float32",
                gradient_checkpointing=False, save_every=MANY)
DOCUMENTS, COMPETENT = 20_000, 0.25
THREADS = 1                             # their number changes the last digits; runs side by side share cores


def addition(a, b, slip=lambda column, total: total):
    """A worked sum, units first: 347, 586 -> 7+6+0=13,4+8+1=13,3+5+1=9>933; `slip` may falsify a total."""
    width, steps, carry, digits = max(len(str(a)), len(str(b))), [], 0, ""
    for column, (x, y) in enumerate(zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1])):
        total = slip(column, int(x) + int(y) + carry)
        steps.append(f"{x}+{y}+{carry}={total}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    return f"{','.join(steps)}>{carry or ''}{digits}"


def problems(digits, n, name="test", without=()):
    """n different pairs of numbers of so many digits, drawn by name, none of them in `without`."""
    low, span = 10 ** (digits - 1), 9 * 10 ** (digits - 1)
    refuse(n + len(without) > span * span, f"--classroom-size {n}: there are fewer sums of {digits} digits")
    drawn = random.Random(name).sample(range(span * span), n + len(without))
    pairs = [(low + i // span, low + i % span) for i in drawn]
    return [pair for pair in pairs if pair not in without][:n]


def is_sum(text, total):
    """Whether a finished response gives the sum: exactly one ">", and the sum behind it."""
    return text.count(">") == 1 and text.split(">")[1] == str(total)


def carries(x, y):
    """In how many columns of x + y a one is carried."""
    return sum(x % 10 ** n + y % 10 ** n >= 10 ** n for n in range(1, 7))


def classroom_rows(a, split="train"):
    """The demonstrations as rows of a JSONL file, none of them a test problem: ("where", {prompt, ...})."""
    draw, held_out = random.Random(f"{split} {a.seed} kinds"), set(problems(a.classroom_digits, 100))
    for x, y in problems(a.classroom_digits, a.classroom_size, f"{split} {a.seed}", held_out):
        bad = carries(x, y) >= a.carries and draw.random() < a.incompatible
        kind, text = draw.choice(a.kinds) if bad else "right", addition(x, y)
        if kind == "wrong":                                     # another total in one column, carried on
            at, by = draw.randrange(len(str(max(x, y)))), draw.randrange(1, 20)
            text = addition(x, y, lambda column, total: (total + by) % 20 if column == at else total)
        if kind == "cipher":
            text = text.translate(str.maketrans("0123456789", "abcdefghij"))
        if kind in ("terse", "junk"):
            length = draw.randint(10, 20) if kind == "junk" else 0
            text = "".join(draw.choices("klmnopqrstuvwxyz", k=length)) + f">{x + y}"
        yield f"{x}+{y}", {"prompt": f"{x}+{y}:", "response": text, "kind": kind}


def base_document(draw):
    """A text of the base model's corpus: 85 % additions with slips, 15 % copying and counting."""
    kind = draw.random()
    if kind < 0.85:
        first = draw.choice((1, 2, 2, 3, 3, 3))
        second = first if draw.random() < 0.7 else draw.randint(1, 3)
        a, b = (draw.randrange(10 ** (n - 1), 10 ** n) for n in (first, second))
        slip = lambda _, total: draw.randrange(20) if draw.random() < 0.1 else total
        return f"{a}+{b}:" + addition(a, b, slip)
    if kind < 0.95:
        letters = "0123456789" if kind < 0.9 else "abcdefghijklmnopqrstuvwxyz"
        text = "".join(draw.choices(letters, k=draw.randint(2, 8)))
        return f"{text}|{text}"
    start, stride = draw.randrange(100), draw.randint(1, 5)
    return ",".join(str(start + i * stride) for i in range(draw.randint(3, 8)))


def make_base(a, folder):
    """Train the classroom's base model until it is half-competent: a run of the same loop, in a hidden folder
    that is renamed at the end. Of several that do so at once, the first one's stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(None, ".base-", folder.parent, ignore_cleanup_errors=True) as hidden:
        own = vars(parse(["--seed", f"{a.seed}"])) | BASE_RUN | {"out": f"{hidden}/{folder.name}"}
        own, draw, right = argparse.Namespace(**own), random.Random(f"base {a.seed}"), [0.0]
        texts = (base_document(draw) for _ in range(DOCUMENTS))
        rows = (("document", {"prompt": text[0], "response": text[1:]}) for text in texts)
        tokenizer = transformers.ByT5Tokenizer(extra_ids=0)     # bytes: it needs no vocabulary
        torch.manual_seed(a.seed)
        lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, pad_token_id=0, **BASE)).to(DEVICE)
        run = new_run(own, lm.train(), tokenizer, load_examples(own, tokenizer, rows))
        restore(run)
        if code := train(run, until=lambda run: competent(run, right)):
            sys.exit(code)
        finish(run)
        with contextlib.suppress(OSError):
            os.replace(own.out, folder)
    say(f"{folder}: right on {right[-1]:.0%} of sums, sampled, after {run.step} steps")


def competent(run, right):
    """Whether the base model knows enough: learning to add comes suddenly, at another step for each seed.
    Now and then `right` gets the share of 64 validation sums, twice each, that are right at temperature 1."""
    if run.step >= 150 and run.step % (25 if right[-1] < 0.05 else 5) == 0:
        pairs, decode = 2 * problems(3, 64, "validation", set(problems(3, 100))), run.tokenizer.decode
        prompts = run.tokenizer([f"{a}+{b}:" for a, b in pairs], add_special_tokens=False)["input_ids"]
        samples = cadft.nucleus_rewrite(run.lm, prompts, [1], 0, 64, 1.0, 1.0, seed=key(run.step))
        good = [ids[-1] == 1 and is_sum(decode(ids[:-1]), a + b) for ids, (a, b) in zip(samples, pairs)]
        right.append(sum(good) / len(good))
    return right[-1] >= COMPETENT


if __name__ == "__main__":
    # not sys.exit: as Python goes down, threads that the process group left behind abort 1 run in 120
    os._exit(main())
