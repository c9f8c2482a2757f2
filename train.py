"""Fine-tune a causal language model with CADFT; or with SFT, DFT, weighted SFT or focal loss, to compare.

    python train.py                                              the classroom: no download, no GPU needed
    python train.py --model MODEL --data FILE.jsonl              your own model and demonstrations
    torchrun --nproc-per-node=8 train.py --model ... --data ...  the same result on eight processes

Where this loop departs from the textbook:
 1. A step is one forward of all micro-batches, graphs kept, then one backward: c_hat needs every score of the
    global batch before the first gradient. --two-pass scores first and then trains, in less memory.
 2. All methods take the same path; they differ in the token loss and in beta (0: no weighting).
 3. A step's data and random numbers depend on (seed, step) alone: not on ranks, micro-batches or the past.
 4. Weights are float32; bfloat16 is autocast over them. Dropout is off: it would depend on the sharding.
"""
import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from collections import ChainMap, Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cadft

LOSSES = {"sft": cadft.sft_loss, "focal": cadft.focal_loss, "dft": cadft.dft_loss,
          "casft": cadft.sft_loss, "cadft": cadft.dft_loss}     # method -> loss of a token
WEIGHTED = {"casft", "cadft"}                                   # methods that weight and rewrite samples
# what may differ between a run and its continuation: it changes no result (of data, the content counts)
MAY_DIFFER = {"out", "data", "resume", "save_every", "micro_batch_tokens", "two_pass",
              "gradient_checkpointing"}
CUDA = torch.cuda.is_available()
TORCHRUN = os.environ.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
WORLD = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if TORCHRUN else 0
DEVICE = torch.device("cuda", LOCAL_RANK) if CUDA else torch.device("cpu")


class Mistake(ValueError):
    """Something in the input is wrong; the message says what, where, and what to do."""


def require(fine, message):
    """Raise Mistake with the message, unless all is fine."""
    if not fine:
        raise Mistake(message)


@dataclass(slots=True)
class Example:
    """One demonstration as token ids."""
    index: int                  # its number among the examples
    line: int                   # its line in the data file
    prompt_ids: torch.Tensor    # [tokens], int32
    response_ids: torch.Tensor  # [|y|], int32; ends with end-of-sequence, unless it was cut
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


# ==== 1. The loop ===========================================================================================

def train_step(run, net, batches):
    """One optimizer step on this rank's micro-batches: the algorithm, whole. Returns columns {name: [G]} of
    the global batch, on the CPU, the same on every rank; and grad_norm."""
    a = run.args
    token_loss = LOSSES[a.method]
    with torch.set_grad_enabled(not a.two_pass):               # of two passes, the first only scores
        outputs = [net(batch["input_ids"], batch["labels"]) for batch in batches]   # nll, mask [rows, T-1]
    c_raw = torch.cat([cadft.compatibility(nll, mask) for nll, mask in outputs])    # [B]
    c_hat = cadft.batch_zscore(c_raw, a.eps)                                        # [B]
    w = cadft.compatibility_weight(c_hat, a.beta)                                   # [B]
    loss = torch.cat([token_loss(nll, mask) for nll, mask in outputs])              # [B]
    dft = torch.cat([cadft.dft_loss(nll, mask) for nll, mask in outputs])           # [B] for the log
    if a.two_pass:
        parts = w.split([len(batch["index"]) for batch in batches])                 # [rows] each
        for batch, part in zip(batches, parts):
            net.require_backward_grad_sync = batch is batches[-1]  # DDP: reduce the gradients once
            nll, mask = net(batch["input_ids"], batch["labels"])
            (cadft.cadft_loss(token_loss(nll, mask), part) * len(part) / len(w)).backward()
    else:
        cadft.cadft_loss(loss, w).backward()

    grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), a.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    columns = {"index": torch.cat([batch["index"] for batch in batches]), "c_raw": c_raw, "c_hat": c_hat,
               "w": w, "loss": loss.detach(), "dft": dft.detach()}
    table = {name: cadft.gather(column).cpu() for name, column in columns.items()}
    return table | {"grad_norm": grad_norm.item()}


def train(run, until=lambda run: False):
    """The loop over steps: train, average, log, rewrite, save; up to --steps, or as far as `until` says."""
    a = run.args
    net = ResponseNLL(run.lm, a.dtype == "bfloat16")
    if dist.is_initialized():
        net = torch.nn.parallel.DistributedDataParallel(
            net, [DEVICE] if CUDA else None, forward_sync_buffers=False, gradient_as_bucket_view=True)
    bar = tqdm(total=a.steps, initial=run.step, desc=Path(a.out).name, unit="step", disable=RANK > 0 or None)
    began = time.perf_counter() - run.seconds
    while run.step < a.steps and not until(run):
        run.step += 1
        step_began = time.perf_counter()
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, a)
        table = train_step(run, net, [collate(rows) for rows in share(run, RANK, WORLD)])
        bad = sorted(run.examples[i].line for i in table["index"][~table["loss"].isfinite()].tolist())
        require(not bad and math.isfinite(table["grad_norm"]), f"loss or gradient is not finite at step "
                f"{run.step}, lines {bad[:8] or 'all'}: look at these, or try a lower --lr")
        run.tracker.update(table["index"], table["c_hat"])
        run.seconds = time.perf_counter() - began
        row = log_row(run, table, time.perf_counter() - step_began)
        record(run, "log.jsonl", [row])
        bar.set_postfix({name: f"{row[name]:.3g}" for name in ("loss", "nll", "w_mean", "rewritten")})
        bar.update()
        if cadft.rewriting_due(run.step, a.rewrite_after, a.rewrite_every):
            rewrite(run)
        if run.step % a.save_every == 0 and run.step < a.steps:
            save(run)
    bar.close()
    save(run)


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
    """One rank's micro-batches of a step, as lists of examples: every world-th of the batch, by length."""
    a = run.args
    epoch, position = divmod(run.step - 1, run.per_epoch)
    generator = torch.Generator().manual_seed(seed_for(a.seed, "epoch", epoch))
    order = torch.randperm(len(run.examples), generator=generator).tolist()
    first = position * a.batch_size
    rows = [run.examples[i] for i in order[first:first + a.batch_size]]
    rows.sort(key=len, reverse=True)
    batches = []
    for e in rows[rank::world]:
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > a.micro_batch_tokens:
            batches.append([])                                  # padded to its first row, the longest
        batches[-1].append(e)
    return batches


def collate(rows):
    """Examples -> {input_ids, labels [B, T], index [B]}; padded on the right with 0, which no token sees."""
    ids = [torch.cat([e.prompt_ids, e.response_ids]) for e in rows]
    labels = [torch.cat([torch.full_like(e.prompt_ids, cadft.IGNORE), e.response_ids]) for e in rows]
    batch = {"input_ids": pad_sequence(ids, batch_first=True), "index": torch.tensor([e.index for e in rows]),
             "labels": pad_sequence(labels, batch_first=True, padding_value=cadft.IGNORE)}
    return {name: value.long().to(DEVICE) for name, value in batch.items()}


def log_row(run, table, elapsed):
    """One line of log.jsonl: numbers of the global batch. nll is per token, c_mean per sample."""
    w, c_raw = table["w"].double(), table["c_raw"].double()                     # [G]
    examples = [run.examples[i] for i in table["index"].tolist()]
    length = torch.tensor([len(e.response_ids) for e in examples])             # [G] |y|
    row = {"step": run.step, "epoch": (run.step - 1) // run.per_epoch + 1, "seconds": run.seconds,
           "lr": learning_rate(run.step, run.args), "loss": (w * table["loss"]).mean().item(),
           "nll": ((c_raw * length).sum() / length.sum()).item(), "dft": table["dft"].double().mean().item(),
           "c_mean": c_raw.mean().item(), "c_std": c_raw.std(correction=0).item(), "w_mean": w.mean().item(),
           "w_min": w.min().item(), "down_weighted": (w < 1).double().mean().item(),
           "grad_norm": table["grad_norm"], "tokens_per_second": sum(map(len, examples)) / elapsed,
           "rewritten": len(run.rewrites),
           "kinds": by_kind(run, examples, {name: table[name] for name in ("c_raw", "c_hat", "w")})}
    if CUDA:
        row["peak_memory"] = torch.cuda.max_memory_allocated()      # bytes, of rank 0
    return row


def by_kind(run, examples, columns):
    """{kind: {"n": examples, and the mean of each column}}; what is rewritten is a kind of its own."""
    kinds = ["rewritten" if e.kind and e.index in run.rewrites else e.kind for e in examples]
    found = {}
    for kind in sorted({*kinds} - {None}):
        at = [i for i, other in enumerate(kinds) if other == kind]
        found[kind] = {"n": len(at)} | {name: column[at].mean().item() for name, column in columns.items()}
    return found


# ==== 2. Rewriting ==========================================================================================

def rewrite(run, chunk=64):
    """One round: pick, toss, sample, write back, record. Chunks and their seeds don't depend on the ranks."""
    a, stops = run.args, run.lm.generation_config.eos_token_id
    picked = run.tracker.pick(a.rewrite_fraction)
    drawn = [i for i in picked if random.Random(seed_for(a.seed, run.step, i)).random() < a.rewrite_prob]
    drawn.sort(key=lambda i: (len(run.examples[i].prompt_ids), i))
    mine = {}                                                   # index -> ids sampled by this rank
    for first in range(RANK * chunk, len(drawn), WORLD * chunk):
        indices = drawn[first:first + chunk]
        prompts = [run.examples[i].prompt_ids.tolist() for i in indices]
        room = min(a.rewrite_max_tokens, a.max_length - len(prompts[-1]))   # the last one is the longest
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=a.dtype == "bfloat16"):
            samples = cadft.nucleus_sample(
                run.lm, prompts, stops, stops[0], room, top_p=a.rewrite_top_p,
                temperature=a.rewrite_temperature, seed=seed_for(a.seed, run.step, "chunk", first // chunk))
        mine.update(zip(indices, samples))
    new = ChainMap(*gather_objects(mine))                       # index -> ids sampled by any rank
    rows = []
    for i in picked:
        e, ids = run.examples[i], new.get(i)
        prompt = e.prompt_ids.tolist()
        rows.append({"step": run.step, "line": e.line, "kind": e.kind, "average": run.tracker.mean[i].item(),
                     "prompt": run.tokenizer.decode(prompt, skip_special_tokens=True),
                     "old": response_text(run.tokenizer, prompt, e.response_ids.tolist())})
        if ids is None:
            rows[-1]["kept"] = "not drawn"
        elif ids[-1] not in stops:                              # paper silent: these two keep the original
            rows[-1]["kept"] = "cut off"
        elif not run.tokenizer.decode(ids, skip_special_tokens=True).strip():
            rows[-1]["kept"] = "empty"
        else:
            rows[-1]["new"] = response_text(run.tokenizer, prompt, ids)
            run.rewrites[i] = e.response_ids = torch.tensor(ids, dtype=torch.int32)
            run.tracker.forget(i)
    record(run, "rewrites.jsonl", rows)


# ==== 3. Data ===============================================================================================

def load_examples(a, tokenizer, rows=None):
    """(examples, ids that end their responses) of the file a.data, or of rows (line, object)."""
    source = a.data or "the classroom"
    examples, ends, notes, changed = [], set(), Counter(), None
    for line, row in tqdm(rows or read_jsonl(a.data), "encoding", unit="row", delay=5, disable=RANK > 0):
        try:
            turns = dialogue(row, a, notes)
            if tokenizer.chat_template:
                fields = set().union(*map(filled, turns)) - {"role"}
                notes.update(f"never used: {name} of turns" for name in fields
                             if name not in str(tokenizer.chat_template))
            prompt, response = encode(tokenizer, turns, row.get("tools"))
            if len(examples) < 100:
                changed = changed or check_tokens(tokenizer, turns)
        except Mistake as mistake:
            raise Mistake(f"{source}, line {line}: {mistake}") from mistake
        ends.add(response[-1])
        kept = response[:max(0, a.max_length - len(prompt))]
        if not kept:
            notes[f"a prompt of {a.max_length} tokens or more leaves no room for the response"] += 1
            continue
        if len(kept) < len(response):
            notes[f"responses cut at {a.max_length} tokens with their prompt"] += 1
        kind = None if row.get("kind") is None else str(row["kind"])
        prompt_ids = torch.tensor(prompt, dtype=torch.int32)
        response_ids = torch.tensor(kept, dtype=torch.int32)
        examples.append(Example(len(examples), line, prompt_ids, response_ids, kind))
    if changed:
        say(changed)
    say(*[f"{note} in {n:,} rows" for note, n in notes.items()])
    require(examples, f"{source}: no usable row")
    return examples, ends


def read_jsonl(path):
    """Yield (line number, object) for each line that is not blank."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line:
                continue
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()    # fails for what is no UTF-8
            except (ValueError, RecursionError) as error:
                raise Mistake(f"{path}, line {number}: not valid JSON in UTF-8, one object a line ({error})")
            require(isinstance(row, dict), f"{path}, line {number}: no object, not {type(row).__name__}")
            yield number, row


def dialogue(row, a, notes):
    """Turns, of which the last is the response: the fields that flags name, or else `messages` up to the last
    assistant turn. What of the row is never used is counted in `notes`."""
    names = [a.prompt_field, a.response_field]
    used = {*names, "tools", "kind"}
    has_fields = names != ["prompt", "response"] or row.keys() >= {*names}
    if "messages" in row and not has_fields:
        used, turns = {"messages", "tools", "kind"}, row["messages"]
        require(isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns),
                '"messages" must be a list of turns, objects with "role" and "content"')
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        require(last > 0, '"messages" needs an assistant turn after a user turn')
        if turns[last + 1:]:
            notes["never used: turns after the last assistant's"] += 1
        turns = turns[:last + 1]
    else:
        for name in names:
            require(isinstance(row.get(name), str) and row[name],
                    f'field "{name}" is missing, empty or not a string; see --prompt-field')
        turns = [{"role": who, "content": row[name]} for who, name in zip(("user", "assistant"), names)]
    notes.update(f"never used: {name}" for name in filled(row) - used)
    return [*wrap(turns[:-1], a.prompt_template), turns[-1]]


def filled(row):
    """The names of the fields that hold something."""
    return {name for name, value in row.items() if value not in (None, "", [], {})}


def wrap(turns, template):
    """The turns with the text of the last user turn put into a --prompt-template."""
    users = [turn for turn in turns if turn["role"] == "user"]
    if not users or not isinstance(users[-1].get("content"), str):
        return turns
    wrapped = users[-1] | {"content": template.replace("{prompt}", users[-1]["content"])}
    return [wrapped if turn is users[-1] else turn for turn in turns]


def render(tokenizer, turns, tools=None, ask=True):
    """The text of turns as the chat template writes them, with a generation prompt if `ask`; without a
    template their bare text."""
    if not tokenizer.chat_template:
        most = 1 if ask else 2
        require(len(turns) <= most, f"{len(turns)} turns, but the tokenizer has no chat template")
        return "".join(str(turn.get("content")) for turn in turns)
    try:
        return tokenizer.apply_chat_template(turns, tools=tools or None, tokenize=False,
                                             add_generation_prompt=ask)
    except Exception as error:                                  # templates raise what they like
        raise Mistake(f"the chat template refuses these turns ({error})") from error


def written(tokenizer, turns, tools=None, ask=True):
    """(text, token ids) of turns; bare text gets the tokenizer's own bos, if it has one."""
    text = render(tokenizer, turns, tools, ask)
    if tokenizer.chat_template:
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    return text, ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def encode(tokenizer, turns, tools=None):
    """(prompt ids, response ids) of a dialogue, whose last turn is the response, as the template writes it,
    with the token that closes it; where there is none, with end-of-sequence."""
    asked, prompt = written(tokenizer, turns[:-1], tools)
    whole, ids = written(tokenizer, turns, tools, ask=False)
    same = len(os.path.commonprefix([asked, whole]))
    require(same == len(asked), f"the chat template asks with ...{asked[same:][-60:]!r} where the dialogue "
            f"goes on with {whole[same:][:60]!r}: the response would not follow what it is asked")
    check_written(turns, asked, whole)
    require(not tools or render(tokenizer, turns[:-1], [*tools, *tools]) != asked,
            "the chat template leaves out the tools")
    check_end(tokenizer, turns, tools, asked, whole)
    response = ids[len(prompt):]
    if ids[:len(prompt)] != prompt:                             # tokens merge where the response begins
        rest = whole[len(asked):]
        alone, line, both = (tokenizer(text, add_special_tokens=False)["input_ids"]
                             for text in (rest, "\n", "\n" + rest))
        # some tokenizers put a space before a text, but none behind a newline
        response = both[len(line):] if both[:len(line)] == line else alone
    ends = special_ids(tokenizer) if tokenizer.chat_template else set()        # nothing closes bare text
    last = max((n for n, token in enumerate(response, 1) if token in ends), default=0)
    closed = response[:last]                                    # without the newline that may follow
    if not closed or tokenizer.decode(response[last:]).strip():
        closed = [*response, tokenizer.eos_token_id]            # nothing closes it
    require(prompt and len(closed) > 1, "no token in the prompt or the response: is it the model's own?")
    return prompt, closed


def check_written(turns, asked, whole):
    """Mistake where the text of the whole dialogue, or of what is asked in it, lacks what a turn says."""
    before, after = ("".join(text.split()) for text in (asked, whole))       # white space doesn't count
    for turn in turns:
        last = turn is turns[-1]
        for text in said(turn, reasoning=last):
            text = text if last else text.split("</think>")[-1]         # templates drop earlier reasoning
            escaped = json.dumps(text, ensure_ascii=False)[1:-1]        # so some write what tools return
            if turn.get("tool_calls") and text.startswith("{"):         # arguments: an object, not its text
                escaped = text
            forms = ["".join(form.split()) for form in (text, escaped)]
            require(any(after.count(form) > before.count(form) if last else form in before for form in forms),
                    f"the chat template leaves out what the {turn['role']} says: {text[:60]!r}")


def check_end(tokenizer, turns, tools, asked, whole):
    """Mistake where the dialogue ends with an opened turn, which is another one once the user goes on."""
    try:
        longer = render(tokenizer, [*turns, {"role": "user", "content": "1"}], tools, ask=False)
    except Mistake:                                             # this template wants other turns
        return
    opened = whole[len(os.path.commonprefix([whole, longer])):]
    require(not opened.strip() or not asked.endswith(opened), "the chat template opens a turn behind the "
            f"response, {opened!r}: let it do so only if add_generation_prompt is true")


def special_ids(tokenizer):
    """Ids that can end a response: special and added tokens, but no unknown word, run of spaces or </tag>."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items()
             if token.special or token.content.strip() and not token.content.startswith("</")}
    return (added | {*tokenizer.all_special_ids}) - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}


def said(turn, reasoning=True):
    """What a turn says: its content, its reasoning, and the tools that it calls with their arguments."""
    texts = [turn.get("content")]
    texts += [turn.get(name) for name in ("reasoning_content", "reasoning", "thinking") if reasoning]
    require(all(isinstance(text or "", str) for text in texts), f"what the {turn['role']} says is not text")
    try:
        for call in turn.get("tool_calls") or []:
            call = call.get("function", call)
            given = call.get("arguments") or {}
            texts += [call["name"], *([given] if isinstance(given, str) else given.values())]
    except (AttributeError, KeyError, TypeError) as error:
        raise Mistake('"tool_calls" must be a list of {"function": {"name", "arguments"}}') from error
    texts = [text for text in texts if text and isinstance(text, str)]
    require(texts or turn["role"] not in ("user", "assistant"), f"a turn ({turn['role']}) is empty")
    return texts


def check_tokens(tokenizer, turns):
    """A line about the first text that its tokens change, if any. Mistake where all space or letters go."""
    for text in [text for turn in turns for text in said(turn)]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        change = f"{text[:60]!r} becomes {back[:60]!r} as tokens; is it the model's own tokenizer?"
        letters = any(map(str.isalnum, text)) and not any(map(str.isalnum, back))
        spaces = len(text.split()) > 1 and len(back.split()) < 2
        require(not letters and not spaces, f"letters or spaces are lost: {change}")
        if back.strip() != text.strip():
            return f"not quite the text: {change}"
    return None


def response_text(tokenizer, prompt_ids, response_ids):
    """A response as text without special tokens; decoded with its prompt, or some decoders drop a space."""
    prompt, whole = (tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                     for ids in (prompt_ids, [*prompt_ids, *response_ids]))
    return whole[len(prompt):]


# ==== 4. Model and processes ================================================================================

def load_model(path, dtype):
    """(model in training mode, tokenizer) of a folder or a hub name. What stops sampling is listed in the
    model's generation_config.eos_token_id."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, mistral_format=False)
        file = transformers.utils.cached_file(path, "tokenizer.json",
                                              _raise_exceptions_for_missing_entries=False)
        rust = getattr(tokenizer, "backend_tokenizer", None)
        if file and rust is not None:   # transformers may rebuild it by its class; the model knows the file's
            saved = type(rust).from_file(file)
            for part in "normalizer", "pre_tokenizer", "model", "decoder":
                setattr(rust, part, getattr(saved, part))
        config = transformers.AutoConfig.from_pretrained(path)
        for part in config, config.get_text_config():           # no dropout
            vars(part).update({name: 0.0 for name, value in vars(part).items()
                               if "drop" in name and isinstance(value, float)})
        require(not getattr(config, "vision_config", None), "this is for text, not pictures")
        require(not getattr(config, "quantization_config", None), "it is quantized; take full weights")
        require(not Path(path, "adapter_config.json").exists(), "adapter_config.json: take merged weights")
        lm, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True)
    except Exception as error:                                  # libraries have many kinds of their own
        raise Mistake(f"{path}: no causal language model can be loaded: {error}") from error
    masks = "masked_bias", ".attn.bias", "attn.attention.bias", "causal_mask"       # constants in old files
    unknown = {name for name in info["unexpected_keys"] if not name.endswith(masks)}
    wrong = sorted({*info["missing_keys"], *unknown})
    require(not wrong, f"{path}: weights are missing, or have no place in the model: {wrong[:3]}")
    require(tokenizer.eos_token_id is not None, f"{path}: its tokenizer has no end-of-sequence token")
    for tensor in (*lm.parameters(), *lm.buffers()):            # a mapped file is aligned otherwise than
        tensor.data = tensor.data.clone()                       # torch's memory: some processors round so too
    settings = lm.generation_config
    lm.generation_config = transformers.GenerationConfig(eos_token_id=stop_ids(lm, tokenizer))
    check_model(lm.to(DEVICE), path)
    settings.eos_token_id = lm.generation_config.eos_token_id
    try:
        settings.validate(strict=True)
        lm.generation_config = settings
    except ValueError:                                          # it could not be saved at the end
        pass
    return lm.train(), tokenizer


@torch.no_grad()
def check_model(lm, path):
    """Mistake where a weight is not finite, or answers depend on later tokens or on padding."""
    bad = [name for name, p in lm.named_parameters() if not p.isfinite().all()]
    require(not bad, f"{path}: weights that are not finite: {bad[:3]}")
    ids = torch.arange(1, 9, device=DEVICE)[None] % len(lm.get_input_embeddings().weight)      # [1, 8]
    pad = torch.nn.functional.pad
    own, shorter = lm(input_ids=ids).logits, lm(input_ids=ids[:, :-1]).logits       # [1, 8, V], [1, 7, V]
    padded = lm.generate(pad(ids, (2, 0), value=3), attention_mask=pad(torch.ones_like(ids), (2, 0)),
                         max_new_tokens=1, output_logits=True, return_dict_in_generate=True).logits[0]
    near = max(torch.finfo(own.dtype).eps, 1e-7) ** 0.5 * own.abs().max()           # parts may be float32
    later, padding = own[:, :-1] - shorter, own[:, -1] - padded
    require(later.abs().max() <= near, f"{path}: not causal: its logits depend on later tokens")
    require(padding.abs().max() <= near, f"{path}: it ignores its attention mask: padding counts")


def check_training(lm):
    """Mistake where a weight gets no gradient (frozen, or not used), or the model draws random numbers."""
    ids = torch.arange(1, 9, device=DEVICE)[None] % len(lm.get_input_embeddings().weight)      # [1, 8]
    nll, again = (cadft.token_nll(lm, ids, None, ids)[0] for _ in range(2))
    nll.sum().backward()
    bad = [name for name, p in lm.named_parameters() if p.grad is None]
    lm.zero_grad()
    require(not bad, f"weights that nothing would train: {bad[:3]}")
    require(torch.allclose(nll, again), "in training the model draws random numbers, which would depend on "
            "micro-batches; set what asks for them (a router's noise?) to 0 in its config.json")


def stop_ids(lm, tokenizer):
    """All ids that end a response: end-of-sequence, what closes a chat's turn, and the model's own."""
    own = lm.generation_config.eos_token_id
    own = {*own} if isinstance(own, list) else {own}
    own -= {None, -1}                                           # some hold these for none
    words = own - special_ids(tokenizer)
    if words:
        say(f"ordinary tokens, so no end of a response: {tokenizer.convert_ids_to_tokens(sorted(words))}")
    stops = own - words | {tokenizer.eos_token_id}
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    with suppress(Mistake):                                     # some templates want other turns
        stops.add(encode(tokenizer, turns)[1][-1])
    return sorted(stops)


def positions(lm):
    """How many tokens the model takes; with LongRoPE, how many until its factors depend on the batch."""
    config = lm.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", 10 ** 12)


def seed_for(*parts):
    """A seed made of several things, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def join():
    """Join torchrun's processes, if it started us: nccl on CUDA, else gloo."""
    if CUDA:
        torch.cuda.set_device(DEVICE)
    if TORCHRUN and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun may keep its store when it restarts workers: lost ones' addresses must not be found there
        store = dist.PrefixStore("try " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if CUDA else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=2))     # some wait while others sample


def gather_objects(value):
    """A list with every rank's value."""
    values = [value] * WORLD
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def say(*lines):
    """Print lines, once for all processes."""
    if RANK == 0 and lines:
        print(*lines, sep="\n", flush=True)


# ==== 5. Nothing lost =======================================================================================

def finished(out):
    """Whether a run's folder holds the final model: its checkpoint goes last."""
    return Path(out, "config.json").exists() and not Path(out, "checkpoint.pt").exists()


def start(run):
    """Begin in --out, or go on from the checkpoint in it. State is copied into a model loaded as at a fresh
    start, so memory lies as if never interrupted; the logs become what the checkpoint says."""
    path = Path(run.args.out, "checkpoint.pt")
    if path.exists():
        state = torch.load(path, map_location="cpu")
        for name in "lm", "optimizer", "tracker":
            getattr(run, name).load_state_dict(state.pop(name))
        vars(run).update(state)
        for i, ids in run.rewrites.items():
            run.examples[i].response_ids = ids
    require(len(set(gather_objects((run.args.data_sha256, run.step)))) == 1,
            "the processes differ in their data or in what --out holds: give all the same files")
    for name, rows in {"args.json": [vars(run.args)], **run.logs}.items():
        write_rows(path.with_name(name), rows, "w")


def save(run):
    """Rank 0: the checkpoint, written beside the old one and put in its place when it is on disk."""
    require(all(p.isfinite().all() for p in run.lm.parameters()),
            f"weights are not finite after step {run.step}: try a lower --lr; nothing was saved")
    if RANK == 0:
        path, draft = Path(run.args.out, "checkpoint.pt"), Path(run.args.out, "checkpoint.tmp")
        state = {name: getattr(run, name) for name in ("step", "seconds", "rewrites", "logs")}
        state |= {name: getattr(run, name).state_dict() for name in ("lm", "optimizer", "tracker")}
        with open(draft, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())                             # on disk, not in a cache
        os.replace(draft, path)


def finish(run):
    """Rank 0: make --out a Hugging Face folder, with compatibility.jsonl; the checkpoint goes last."""
    if RANK == 0:
        out, rows = Path(run.args.out), []
        run.lm.save_pretrained(out)
        run.tokenizer.save_pretrained(out)
        for e, average, visits in zip(run.examples, run.tracker.mean.tolist(), run.tracker.seen.tolist()):
            rows.append({"line": e.line, "average": average, "visits": visits, "kind": e.kind,
                         "rewritten": e.index in run.rewrites})
        write_rows(out / "compatibility.jsonl", sorted(rows, key=lambda row: -row["average"]), "w")
        (out / "checkpoint.pt").unlink()


def record(run, name, rows):
    """Add rows to one of the run's logs."""
    run.logs[name] += rows
    write_rows(Path(run.args.out, name), rows, "a")


def write_rows(path, rows, mode):
    """Rank 0: rows as a JSONL file, or at the end of one; its folder is made, too."""
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(path):
    """What a JSON file holds; {} where there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


# ==== 6. The classroom: skip it on a first reading ==========================================================

KINDS = ["wrong", "cipher", "terse", "junk"]           # of the classroom's incompatible demonstrations
CLASSROOM = dict(rewrite_after=60, rewrite_every=6, rewrite_max_tokens=96, steps=300, batch_size=32,
                 micro_batch_tokens=8192, max_length=128, lr=1e-4, weight_decay=0.0, save_every=100,
                 classroom_size=640, classroom_digits=3, incompatible=0.4, kinds=KINDS,
                 gradient_checkpointing=False)
BASE = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=128, initializer_range=0.08, tie_word_embeddings=True, vocab_size=259,
            bos_token_id=None, eos_token_id=1, pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0})     # 10000 is for longer texts
# the base model's run: on its own corpus, from random weights, until this share of sums is right
BASE_RUN = dict(steps=1200, lr=2e-3, warmup_ratio=0.04, weight_decay=0.01, dtype="float32",
                save_every=10 ** 9)
DOCUMENTS, COMPETENT = 20_000, 0.25
THREADS = 1                             # their number changes the last digits; runs side by side share cores


def addition(a, b, slip=lambda column, total: total):
    """A worked sum, units first: 347, 586 -> 7+6+0=13,4+8+1=13,3+5+1=9>933; `slip` may falsify a total."""
    width = max(len(str(a)), len(str(b)))
    steps, carry, digits = [], 0, ""
    for column, (x, y) in enumerate(zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1])):
        total = slip(column, int(x) + int(y) + carry)
        steps.append(f"{x}+{y}+{carry}={total}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    return f"{','.join(steps)}>{carry or ''}{digits}"


def problems(digits, n, name="test", without=()):
    """n different pairs of numbers of so many digits, drawn by name, none of them in `without`."""
    low, span = 10 ** (digits - 1), 9 * 10 ** (digits - 1)
    require(n + len(without) <= span * span, f"--classroom-size {n}: too few sums of {digits} digits")
    drawn = random.Random(name).sample(range(span * span), n + len(without))
    pairs = [(low + i // span, low + i % span) for i in drawn]
    return [pair for pair in pairs if pair not in without][:n]


def is_sum(text, total):
    """Whether a finished response gives the sum: exactly one ">", and the sum behind it."""
    return text.count(">") == 1 and text.split(">")[1] == str(total)


def classroom_rows(a, split="train"):
    """Yield the demonstrations, none of them a test problem, as the rows of a JSONL file: (line, object)."""
    draw = random.Random(f"{split} {a.seed} kinds")
    held_out = set(problems(a.classroom_digits, 100))
    pairs = problems(a.classroom_digits, a.classroom_size, f"{split} {a.seed}", held_out)
    for line, (x, y) in enumerate(pairs, 1):
        bad = draw.random() < a.incompatible
        kind, text = draw.choice(a.kinds) if bad else "right", addition(x, y)
        if kind == "wrong":                                     # another total in one column, carried on
            at = draw.randrange(len(str(max(x, y))))
            by = draw.randrange(1, 20)
            text = addition(x, y, lambda column, total: (total + by) % 20 if column == at else total)
        if kind == "cipher":
            text = text.translate(str.maketrans("0123456789", "abcdefghij"))
        if kind in ("terse", "junk"):
            length = draw.randint(10, 20) if kind == "junk" else 0
            text = "".join(draw.choices("klmnopqrstuvwxyz", k=length)) + f">{x + y}"
        yield line, {"prompt": f"{x}+{y}:", "response": text, "kind": kind}


def make_base(a, folder):
    """Train the classroom's base model by the same loop, in a hidden folder that is renamed at the end."""
    hidden = folder.with_name(f".{folder.name}-{gather_objects(os.getpid())[0]}")
    own = parse(["--method", "sft", "--seed", str(a.seed), "--out", str(hidden)])
    vars(own).update(BASE_RUN)
    draw, rows = random.Random(f"base {a.seed}"), []
    for line in range(1, DOCUMENTS + 1):                        # sums, in which one total in ten is wrong
        first = draw.choice((1, 2, 2, 3, 3, 3))
        second = first if draw.random() < 0.7 else draw.randint(1, 3)
        x, y = (draw.randrange(10 ** (digits - 1), 10 ** digits) for digits in (first, second))
        text = addition(x, y, lambda _, total: draw.randrange(20) if draw.random() < 0.1 else total)
        rows.append((line, {"prompt": str(x)[0], "response": f"{x}+{y}:{text}"[1:]}))
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)         # bytes: it needs no vocabulary
    torch.manual_seed(a.seed)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).to(DEVICE).train()
    lm.generation_config.eos_token_id = [tokenizer.eos_token_id]
    run = new_run(own, lm, tokenizer, *load_examples(own, tokenizer, rows))
    start(run)
    train(run, until=lambda run: run.step >= 150 and run.step % 25 == 0 and competence(run) >= COMPETENT)
    finish(run)
    if RANK == 0 and not finished(folder):                      # of several at once, the first one's stays
        os.replace(hidden, folder)
    right = competence(run)                                     # the others wait here
    say(f"{folder}: right on {right:.0%} of sums, sampled, after {run.step} steps")


def competence(run):
    """The share of 64 validation sums, twice each, that are right at temperature 1; as rank 0 finds it."""
    pairs = 2 * problems(3, 64, "validation", set(problems(3, 100)))
    prompts = [written(run.tokenizer, [{"role": "user", "content": f"{x}+{y}:"}])[1] for x, y in pairs]
    samples = cadft.nucleus_sample(run.lm, prompts, [1], 0, 64, 1.0, 1.0, seed=seed_for(run.step))
    right = [ids[-1] == 1 and is_sum(response_text(run.tokenizer, prompt, ids), x + y)
             for prompt, ids, (x, y) in zip(prompts, samples, pairs)]
    return gather_objects(sum(right) / len(right))[0]


# ==== 7. The command line ===================================================================================

class Parser(argparse.ArgumentParser):
    """argparse, but mistakes in the flags raise Mistake."""

    def add(self, flag, help, default=None, **how):
        """A flag, whose help ends with its default."""
        self.add_argument(flag, help=f"{help} ({default})" if default else help, default=default, **how)

    def error(self, message):
        """What argparse calls for a mistake, instead of its own exit."""
        raise Mistake(f"{message}; see --help")


def within(kind, low, high=math.inf):
    """A `type=` for argparse: an int or a float from low to high."""
    def read(text):
        """What argparse calls."""
        if not low <= kind(text) <= high:                       # nan is not
            raise argparse.ArgumentTypeError(f"must lie between {low} and {high}, got {text}")
        return kind(text)
    return read


# the flags, with the paper's values: those for your own model
PARSER = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                epilog=f"Without --model: {CLASSROOM}")
add = PARSER.add
switch = argparse.BooleanOptionalAction
fraction = within(float, 0, 1)
positive = within(float, 1e-30)
count = within(int, 1)
whole = within(int, 0)
add("--model", "a Hugging Face folder or hub name; with --data", "")
add("--data", "a JSONL file; with --model", "")
add("--out", "output folder (out/<method>-seed<seed>)")
add("--method", "token loss and weighting", "cadft", choices=LOSSES)
add("--resume", "go on from the checkpoint in --out, if there is one", False, action=switch)
add("--prompt-field", "JSONL field of the prompt", "prompt")
add("--response-field", "JSONL field of the response", "response")
add("--prompt-template", 'wraps each prompt: "{prompt} Reason step by step."', "{prompt}")
add("--dtype", "else bfloat16 on CUDA with --model", choices=["float32", "bfloat16", "float64"])
add("--gradient-checkpointing", "recompute activations in backward", True, action=switch)
add("--two-pass", "score, then train: memory of one micro-batch", False, action=switch)
add("--beta", "w = exp(-beta max(0, c_hat)); 0: all are 1", 1.0, type=within(float, 0, 1e9))
add("--eps", "added to the standard deviation of the z-score", 1e-6, type=positive)
add("--ema-decay", "of the moving average of c_hat", 0.5, type=within(float, 0, 0.9999))
add("--rewrite-after", "T_warm: no rewriting before this step", 3000, type=whole)
add("--rewrite-every", "K: steps between rounds; 0: no rewriting", 1000, type=whole)
add("--rewrite-fraction", "share of the data set that a round may pick", 0.005, type=fraction)
add("--rewrite-prob", "probability that a picked example is rewritten", 0.5, type=fraction)
add("--rewrite-top-p", "nucleus of a rewrite", 0.9, type=within(float, 1e-3, 1))
add("--rewrite-temperature", "temperature of a rewrite", 0.7, type=within(float, 1e-3))
add("--rewrite-max-tokens", "length limit of a rewrite (paper silent)", 2048, type=count)
add("--steps", "optimizer steps; 0: as many as --epochs makes", 0, type=whole)
add("--epochs", "instead of --steps: passes over the data (1)", type=count)
add("--batch-size", "|B|: the effective global batch, of all ranks", 256, type=count)
add("--micro-batch-tokens", "padded tokens of one forward", 16384, type=count)
add("--max-length", "of prompt and response; longer ones are cut", 2048, type=within(int, 2))
add("--lr", "peak learning rate", 5e-5, type=positive)
add("--warmup-ratio", "share of the steps that warm up; then a cosine to 0", 0.1, type=fraction)
add("--weight-decay", "of AdamW", 0.01, type=within(float, 0))
add("--clip", "largest gradient norm", 1.0, type=positive)
add("--seed", "decides order, rewrites, and all of the classroom", 0, type=whole)
add("--save-every", "steps between checkpoints", 50, type=count)
add("--classroom-size", "demonstrations in the classroom", type=count)
add("--classroom-digits", "digits of the numbers; the base knows 1 to 3", type=within(int, 2, 6))
add("--incompatible", "share of incompatible demonstrations in the classroom", type=fraction)
add("--kinds", "of incompatible demonstrations", nargs="+", choices=KINDS)


def parse(argv):
    """The arguments, with the paper's values (your own model) or the classroom's in place of unset ones."""
    a = PARSER.parse_args(argv)
    require(bool(a.model) == bool(a.data), "--model and --data go together; with neither, the classroom runs")
    classroom = [a.classroom_size, a.classroom_digits, a.incompatible, a.kinds]
    require(not a.model or classroom == [None] * 4, "--classroom-*, --incompatible, --kinds: no --model")
    require(not a.epochs or not a.steps, "--steps and --epochs exclude each other")
    require("{prompt}" in a.prompt_template, "--prompt-template: the prompt is lost without its {prompt}")
    if not a.model:
        a = PARSER.parse_args(argv, argparse.Namespace(**CLASSROOM))
        a.steps = 0 if a.epochs else a.steps
    a.model = os.path.realpath(a.model) if os.path.isdir(a.model) else a.model
    a.out = a.out or f"out/{a.method}-seed{a.seed}"
    a.dtype = a.dtype or ("bfloat16" if CUDA and a.model else "float32")
    return a


def program(body):
    """body(argv) as a main function that returns the exit code: 0, or 2 after one line about a mistake."""
    def main(argv=None):
        """The program on these arguments, or on the command line's."""
        threads = torch.get_num_threads()
        try:
            body(argv)
            return 0
        except torch.OutOfMemoryError:
            message = ("out of memory: train.py takes --two-pass, then a smaller --micro-batch-tokens or "
                       "--max-length; evaluate.py a smaller --batch-size")
        except (Mistake, OSError) as error:
            message = str(error)
        finally:                                                # another program may go on from here
            torch.set_num_threads(threads)
        # mistakes mostly meet every process: a node's first one speaks, and torchrun ends the others as they
        # wait; one that is still there was alone with its mistake, and speaks too
        time.sleep(10 * (LOCAL_RANK > 0))
        print("error:", " ".join(message.split())[:450], file=sys.stderr, flush=True)
        return 2
    return main


def new_run(a, lm, tokenizer, examples, ends):
    """A run at its beginning, once what can be known to fail before the first step is checked."""
    n = len(examples)
    token = max(int(ids.max()) for e in examples for ids in (e.prompt_ids, e.response_ids))
    require(a.max_length <= positions(lm), f"--max-length {a.max_length}: the model takes {positions(lm)}")
    require(a.batch_size <= n, f"--batch-size {a.batch_size}: there are only {n} examples")
    require(a.batch_size % WORLD == 0, f"--batch-size {a.batch_size}: no multiple of {WORLD} processes")
    require(token < len(lm.get_input_embeddings().weight), f"the model has no token {token} of the data")
    a.steps = a.steps or (a.epochs or 1) * (n // a.batch_size)
    if a.method not in WEIGHTED:
        a.beta = 0.0
        a.rewrite_every = 0
    a.data_sha256 = hashlib.sha256(Path(a.data).read_bytes()).hexdigest() if a.data else ""
    saved = read_json(Path(a.out, "args.json"))
    differ = [f"--{name.replace('_', '-')} (was {saved.get(name)}, is {value})"
              for name, value in vars(a).items() if name not in MAY_DIFFER and saved.get(name) != value]
    require(not saved or not differ, f"{a.out} holds another run; it differs in {', '.join(differ)}")
    check_training(lm)
    lm.generation_config.eos_token_id = sorted({*lm.generation_config.eos_token_id, *ends})
    if a.gradient_checkpointing:
        require(lm.supports_gradient_checkpointing, "this model needs --no-gradient-checkpointing")
        lm.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=a.weight_decay, fused=True)
    tracker = cadft.CompatibilityEMA(n, a.ema_decay)
    return Run(a, lm, tokenizer, examples, optimizer, tracker, n // a.batch_size)


def report(run):
    """Say what happened; by kind, where kinds are known, of examples seen (since they were rewritten)."""
    seen = [e for e in run.examples if run.tracker.seen[e.index]]      # the others' average is 0
    mean = run.tracker.mean[[e.index for e in seen]]
    columns = {"c_hat": mean, "w": cadft.compatibility_weight(mean, run.args.beta)}
    for kind, row in by_kind(run, seen, columns).items():
        say(f"  {kind:15} {row['n']:5} seen, on average c_hat {row['c_hat']:5.2f}, w {row['w']:4.2f}")
    log = run.logs["log.jsonl"]
    say(f"model: {run.args.out}, after {run.seconds:.0f} s; nll {log[0]['nll']:.3f} in the first step, "
        f"{log[-1]['nll']:.3f} in the last; {len(run.rewrites)} examples rewritten")


@program
def main(argv):
    """train.py: load, or in the classroom make, the base model; train; save."""
    a = parse(argv)
    join()
    out, base, rows = Path(a.out), Path(a.out).parent / f"base-seed{a.seed}", None
    goes_on = a.resume and (out / "args.json").exists()
    is_free = not out.exists() or not any(out.iterdir())
    require(goes_on or is_free, f"--out {out} is not empty; --resume goes on with a run in it")
    require(not out.name.startswith("base-seed"), f"--out {out}: this is a name for base models")
    if not a.model:
        torch.set_num_threads(THREADS)
        rows = classroom_rows(a)
        if not gather_objects(finished(base))[0]:
            make_base(a, base)
    lm, tokenizer = load_model(a.model or base, torch.float64 if a.dtype == "float64" else torch.float32)
    run = new_run(a, lm, tokenizer, *load_examples(a, tokenizer, rows))
    if finished(out):
        say(f"{out} holds a finished run; nothing to do")
        return
    start(run)
    say(f"{a.method} on {a.model or 'the classroom'}, {lm.num_parameters():,} parameters, {a.dtype}: "
        f"{len(run.examples):,} examples, {a.steps:,} steps of {a.batch_size} ({run.per_epoch:,} an epoch)")
    rounds = [step for step in range(run.per_epoch + 1, a.steps + 1)    # before that, nothing is seen twice
              if cadft.rewriting_due(step, a.rewrite_after, a.rewrite_every)
              and a.rewrite_fraction * a.rewrite_prob > 0]
    say(f"rewriting: after step {rounds[0]:,} and every {a.rewrite_every:,} steps" if rounds else
        f"rewriting: never, with {a.method}, T_warm {a.rewrite_after} and K {a.rewrite_every}")
    train(run)
    finish(run)
    report(run)


def quiet():
    """Of transformers' messages show errors only, of progress bars only ours; for programs, not importers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    quiet()
    # not sys.exit: as Python goes down, threads that the process group left behind abort 1 run in 120
    os._exit(main())
