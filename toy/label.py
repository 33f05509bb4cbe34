"""A page on which you choose the better of two images. The choices are pairs to train on.

    python toy/label.py --model toy/tiny-faces --out my-taste
    python toy/label.py --policy runs/my-taste --out my-taste     # a second round
    python toy/label.py --data photos --out my-taste

With --model it draws pairs while you look: two images for one prompt. With --policy a trained
policy draws them. They may be added to an OUT that has pairs of its --model.

With --data it shows what exists: the pairs of any set that diffusion_dpo.py reads, or the images in
a folder. Two images in a folder are a pair if they have the same prompt. The prompt of cat.png is
the text in cat.txt. Without that file it is what ComfyUI or AUTOMATIC1111 have written into the
PNG, or else the name of the subfolder.

Only this machine can open the page. The keys are: left and right arrow, space for a tie, backspace
to undo. Mouse and touch work, too. Chance decides which image is on the left. After every ten pairs
one of them is shown again, and the page says how often you agreed with yourself.

Each choice is written at once, as a line of OUT/pairs.jsonl. You may stop the server by Ctrl-C at
any time. The same command goes on where it was. `diffusion_dpo.py --data OUT` trains on the
choices.
"""

import io
import itertools
import json
import math
import os
import random
import re
import shlex
import sys
import threading
import webbrowser
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import diffusers
import torch
import transformers
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
import diffusion_dpo as dpo
from toy import figure, judge

PAGE = HERE / "label.html"
BLOCK = 10  # after so many pairs, one of the first half of them is shown again
TINY = 64  # pixels a side: models up to this size are tiny ones, which draw best without guidance
ENOUGH = 20  # preferences: from here on the page shows the command that trains

# The flags that train on the choices: those of toy/faces.md, F5, and those of the README.
FLAGS = {
    "tiny": "--beta 500 --lr 3e-5 --batch 16 --micro-batch 16 --sample-every 50 --guidance 1",
    "sd15": "--lora 16 --lr 1e-4 --micro-batch 2 --batch 64",
    "sdxl": "--lora 16 --lr 1e-4 --micro-batch 1 --batch 64 --optimizer adamw",
    "sd35": "--micro-batch 1 --batch 64 --sample-every 0"}

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "left", "answer")  # of OUT/pairs.jsonl
TYPES = {".png": "image/png", ".jpeg": "image/jpeg", ".webp": "image/webp"}
CHOICES = ("left", "right", "tie", "undo")
START = os.urandom(8).hex()  # a tab of an earlier start may show other pairs; it must not choose
LOCAL = ("127.0.0.1", "localhost")
# Inputs of ComfyUI's nodes that hold the prompt, or lead to a node that does.
LEADING_TO_TEXT = ("text", "text_g", "t5xxl", "clip_l", "prompt", "string", "value", "positive",
                   "conditioning", "conditioning_1", "conditioning_to")


# --------------------------------------------------------------------------- pairs that are drawn

class DrawnPairs:
    """Pairs of images that the model, or a policy, draws for the prompts in turn.

    Raises UserError.
    """

    def __init__(self, args, cfg):
        own = Path(cfg.model, "prompts.txt")
        if not args.prompts and not own.exists():
            raise dpo.UserError("--prompts is missing: a text file with a prompt per line")
        self.prompts = judge.read_prompts("--prompts", args.prompts or own)
        self.cfg, self.policy, self.seed, self.count = cfg, args.policy, args.seed, args.pairs
        # Each policy has images of its own, also one that was trained anew in the same folder.
        found = sorted(Path(args.policy).rglob("*.safetensors")) if args.policy else []
        changed = [file.stat().st_mtime_ns for file in found]
        self.prefix = dpo.hash_of(changed)[:6]

    def make(self, out):
        """Yield the prompt and the names of the two images, for each pair.

        The images are in OUT/images. What an earlier start has drawn is not drawn again.
        """
        task = None
        at_once = 8 if self.cfg.resolution <= TINY else 1  # pairs
        for first in range(0, self.count, at_once):
            pairs = []
            for number in range(first, min(first + at_once, self.count)):
                names = [f"{self.prefix}-{number:05d}-{half}.png" for half in (0, 1)]
                pairs.append((self.prompts[number % len(self.prompts)], names))

            missing = [(prompt, name) for prompt, names in pairs for name in names
                       if not (out / "images" / name).exists()]
            if missing:
                task = task or open_task(self.cfg, self.policy)
                self.draw(task, missing, out)
            yield from pairs

    def draw(self, task, missing, out):
        """Draw the image of each (prompt, name) in `missing`, from noise of its own."""
        # Each name, and so each policy, has noise of its own: a second round shows other faces.
        jobs = [(prompt, f"{self.seed} {name}") for prompt, name in missing]
        images = figure.sample_images(task, "policy" if self.policy else "reference", jobs)
        for (_, name), image in zip(missing, images, strict=True):
            with dpo.atomic_write(out / "images" / name) as partial:
                image.save(partial, "PNG")


def open_task(cfg, policy):
    """The model, with the policy's weights if there is one, as a task. Raises UserError."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    device = dpo.start_processes(torch.cuda.is_available(), cfg.precision)
    task = dpo.StableDiffusion(cfg, device, dpo.load_pipeline(cfg.model))
    if policy:
        dpo.load_weights(task, policy)
    return task


# ------------------------------------------------------------------------------- pairs that exist

class ExistingPairs:
    """Pairs of --data: rows of a preference set, or images of one prompt in a folder.

    Labels are not looked at. Raises UserError.
    """

    prompts = None  # each pair has its own
    prefix = ""

    def __init__(self, args):
        folder = Path(args.data)
        self.root = dpo.root_of(args.data)
        is_set = (folder / "pairs.jsonl").exists() or any(folder.rglob("*.parquet"))
        if folder.is_dir() and not is_set:
            if args.split != "train":
                raise dpo.UserError(f"--split {args.split}: a folder of images has no splits")
            groups = group_by_prompt(images_in(folder), folder)
            self.pairs = pairs_of_groups(groups, folder, args.seed)
            there = sum(math.comb(len(group), 2) for group in groups.values())
        else:
            self.pairs = dpo.load_pairs(args.data, args.split)
            there = len(self.pairs)
            if self.pairs.features["first"].dtype == "string":
                raise dpo.UserError(f"--data {args.data}: it is encoded; name the images")
        if not there:
            raise dpo.UserError(f"--data {args.data}: no two of its images (PNG, JPEG, WebP)"
                                " have the same prompt")
        self.count = min(args.pairs, there)
        print(f"data        {args.data}: {there:,} pairs are possible, {self.count:,} are shown")

    def make(self, out):
        """Yield the prompt and the names of the two images, copied to OUT/images, for each pair."""
        made = 0
        for pair in self.pairs:
            if made == self.count:
                return
            try:
                names = [self.copy(pair[side], out) for side in ("first", "second")]
            except Exception as error:  # decoders raise anything
                print(f"\nWARNING     {pair['row']!r}: {dpo.one_line(error)}")
                continue
            made += 1
            yield pair["prompt"] or "", names

    def copy(self, value, out):
        """Copy an image that can be trained on, and return its new name, a hash."""
        content = dpo.image_bytes(value, self.root)
        dpo.read_image({"bytes": content}, self.root)
        kind = Image.open(io.BytesIO(content)).format
        suffix = {"PNG": "png", "WEBP": "webp"}.get(kind, "jpeg")  # some cameras' JPEGs are "MPO"
        file = out / "images" / f"{dpo.hash_of(content)}.{suffix}"
        if not file.exists():
            with dpo.atomic_write(file) as partial:
                partial.write_bytes(content)
        return file.name


def images_in(folder):
    """The image files in a folder and its subfolders. Hidden ones are left out."""
    kinds = {".png", ".jpg", ".jpeg", ".webp"}
    files = sorted(file for file in folder.rglob("*")
                   if file.suffix.lower() in kinds and not file.is_dir())
    return [file for file in files if "/." not in f"/{file.relative_to(folder)}"]


def group_by_prompt(files, folder):
    """The files that have the same prompt: {prompt: files}."""
    groups = {}
    for file in files:
        # No file can hold half a surrogate pair, as in a torn emoji or in an odd folder's name.
        prompt = prompt_of(file, folder).encode(errors="replace").decode()
        groups.setdefault(prompt, []).append(file)
    if "" in groups:
        print(f"WARNING     images without a prompt: {len(groups[''])}; their caption is empty")
    single = sum(len(group) == 1 for group in groups.values())
    if single:
        print(f"WARNING     images left out: {single}; no other one has their prompt")
    return groups


def pairs_of_groups(groups, folder, seed):
    """Rows as those of a preference set: a pair of each prompt, then a second one of each, ..."""
    each = [tournament(group, seed) for group in groups.values()]
    for pairs in itertools.zip_longest(*each):
        for prompt, pair in zip(groups, pairs, strict=True):
            if pair:  # None where a prompt has no more
                paths = [str(file.relative_to(folder)) for file in pair]
                first, second = ({"bytes": None, "path": path} for path in paths)
                yield {"prompt": prompt, "first": first, "second": second,
                       "row": " and ".join(paths)}


def tournament(group, seed):
    """All pairs of a group, in n rounds. Nobody is in two pairs of a round.

    In the first round everyone is in a pair, but one if n is odd.
    """
    players = list(group)
    random.Random(seed).shuffle(players)
    n = len(players)
    for total in range(1, n + 1):  # with 0, two of an even n would have no partner in the first
        for i in range(n):
            j = (total - i) % n  # in a round i + j is the same, up to a multiple of n
            if i < j:
                yield players[i], players[j]


def prompt_of(file, folder):
    """The prompt of an image: the text beside it, or in it, or its subfolder. Raises UserError."""
    beside = file.with_suffix(".txt")
    if beside.exists():
        with dpo.blame(f"{beside}"):
            return beside.read_text(encoding="utf-8-sig").strip()
    try:
        with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:
            found = prompt_in(image.info)
    except Exception:  # a stranger's file raises anything; make() reports an unreadable image
        found = ""
    if found or file.parent == folder:
        return found
    return file.parent.name


def prompt_in(texts):
    """The prompt in a PNG's texts {name: text}, or "". Raises an error of any kind if it is odd.

    AUTOMATIC1111 begins "parameters" with it. ComfyUI keeps its graph of nodes in "prompt". There,
    the input "positive" of a sampler, or "conditioning" of a guider, leads to the text.
    """
    if "parameters" in texts:
        return re.split(r"(?:^|\n)(?:Negative prompt|Steps): ", texts["parameters"])[0].strip()
    nodes = json.loads(texts.get("prompt", "{}"))
    for name in ("positive", "conditioning"):
        for node in nodes.values():
            text = text_of(node.get("inputs", {}).get(name), dict(nodes))
            if text:
                return text
    return ""


def text_of(value, nodes):
    """What an input of ComfyUI's graph says: its own text, or that of the node it is linked to."""
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, list):  # a link is a list of a node and a number
        return ""
    # Each node is visited once: in a stranger's graph the ways may be too many to try.
    inputs = nodes.pop(str(value[0]), {"inputs": {}})["inputs"]
    found = (text_of(inputs[name], nodes) for name in LEADING_TO_TEXT if name in inputs)
    return next(filter(None, found), "")


# --------------------------------------------------------------------------------- the choices

class Choices:
    """The choices so far, which are OUT/pairs.jsonl, and what is shown next.

    A line has Pick-a-Pic's columns caption, jpg_0, jpg_1, label_0, and two of its own. "left" tells
    which image was on the left, 0 or 1. "answer" is 1 if the first image was chosen, 0 if the
    second was, 0.5 for a tie. It is the label as well, unless the pair was shown for the second
    time: then label_0 is null, and training leaves the line out.

    A turn is the number of choices before it. Several threads may call choose(), add(), end() and
    state(). Raises UserError.
    """

    def __init__(self, out, source, seed):
        self.out, self.seed = out, seed
        self.file = out / "pairs.jsonl"
        self.lock = threading.Lock()
        self.pairs = []  # (prompt, path of the first image, path of the second one)
        self.complete = False  # True if no pair will be added any more
        self.lines = []
        earlier = 0  # pairs that another policy has drawn
        if self.file.exists():
            with dpo.blame(f"{self.file}: it is not as this tool writes it"):
                for text in self.file.read_text().splitlines():
                    line = json.loads(text)
                    self.lines.append({name: line[name] for name in COLUMNS})
                # Pairs of another policy are among them, so that undo can show them again.
                self.pairs = list(dict.fromkeys(self.chosen()))
                ours = f"images/{source.prefix}"
                earlier = sum(not first.startswith(ours) for _, first, _ in self.pairs)
        # Of the pairs, each once. --pairs may be lower than it was at an earlier start.
        self.count = max(earlier + source.count, len(self.pairs))

    def write(self, lines):
        with dpo.atomic_write(self.file) as partial:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            partial.write_text(text)
        self.lines = lines  # only now, so that a full disk leaves page and file the same

    def choose(self, turn, choice):
        """Take a choice of CHOICES, or take the last one back. Does nothing for an earlier turn."""
        with self.lock:
            if turn != len(self.lines):
                return
            if choice == "undo":
                self.write(self.lines[:-1])
                return
            shown = self.shown()
            if not shown:
                return
            pair, left, again = shown
            # On the left is the first image if `left` is 0, and the second one if it is 1.
            answer = {"left": 1 - left, "right": left, "tie": 0.5}[choice]
            line = (*pair, None if again else answer, left, answer)
            self.write([*self.lines, dict(zip(COLUMNS, line, strict=True))])

    def shown(self):
        """The pair of this turn, which image is on the left, and whether it was shown before.

        None if there is no pair, or not yet.
        """
        firsts = self.chosen()
        repeats = len(self.lines) - len(firsts)
        chance = random.Random(f"{self.seed} {len(self.lines)}")  # so undo brings the same back
        left = chance.randrange(2)
        if len(firsts) >= BLOCK * (repeats + 1):
            block = firsts[BLOCK * repeats:]
            return block[chance.randrange(BLOCK // 2)], left, True
        new = self.new()
        return (new[0], left, False) if new else None

    def chosen(self):
        """The pairs that were shown, in their order, each once."""
        return [pair_of(line) for line in self.lines if is_first(line)]

    def new(self):
        """The pairs that were not shown yet."""
        chosen = set(self.chosen())
        return [pair for pair in self.pairs if pair not in chosen]

    def add(self, prompt, names):
        """Add a pair that can be shown, by its prompt and the names of its images."""
        pair = (prompt, *(f"images/{name}" for name in names))
        with self.lock:
            if pair not in self.pairs:
                self.pairs.append(pair)

    def end(self):
        """No pair will be added any more. Unreadable ones are not among them."""
        with self.lock:
            self.count, self.complete = len(self.pairs), True

    def agreement(self):
        """How many second showings had the answer of the first one, and how many there were."""
        answers = {pair_of(line): line["answer"] for line in self.lines if is_first(line)}
        same = [answers.get(pair_of(line)) == line["answer"] for line in self.lines
                if not is_first(line)]
        return sum(same), len(same)

    def state(self):
        """What the page shows, as a dict for JSON."""
        with self.lock:
            shown = self.shown()
            firsts = [line for line in self.lines if is_first(line)]
            same, again = self.agreement()
            state = {"turn": len(self.lines), "turns": self.count + self.count // BLOCK,
                     "decided": sum(line["label_0"] != 0.5 for line in firsts),
                     "ties": sum(line["label_0"] == 0.5 for line in firsts),
                     "same": same, "again": again,
                     "complete": self.complete and shown is None,
                     "ahead": [path for pair in self.new()[:4] for path in pair[1:]]}
            if shown:
                (prompt, *images), left, _ = shown
                state |= {"prompt": prompt, "left": images[left], "right": images[1 - left]}
            return state


def is_first(line):
    """True for a pair's first showing."""
    return line["label_0"] is not None


def pair_of(line):
    return line["caption"], line["jpg_0"], line["jpg_1"]


# ------------------------------------------------------------------------------------- the server

def make_server(port, choices, command):
    """A server of the page and its choices, for this machine alone. Raises OSError."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.choices, server.command = choices, command
    return server


class Handler(BaseHTTPRequestHandler):
    """Answers a request: the page, its state, an image, or a choice. All else is refused."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds, so that an idle connection ends
    error_content_type = "text/plain"
    error_message_format = "%(message)s. %(explain)s\n"  # the page shows it as it is

    def handle(self):
        with suppress(ConnectionError):  # the browser may leave at any time, as by a reload
            super().handle()

    def log_message(self, *args):
        """Print nothing: the terminal has the progress bar."""

    def is_allowed(self):
        """True if the request is from our page. Others are refused, as any site may send one."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin", f"http://{host}")
        if host.partition(":")[0] not in LOCAL or origin != f"http://{host}":
            self.send_error(403, "Open the page by the address that label.py has printed")
            return False
        return True

    def reply(self, kind, content):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy",
                         "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'")
        self.end_headers()
        self.wfile.write(content)

    def reply_state(self):
        state = self.server.choices.state() | {"start": START}
        if state["decided"] >= ENOUGH or state["complete"] and state["decided"]:
            state["command"] = self.server.command(state["decided"])
        self.reply("application/json", json.dumps(state).encode())

    def do_GET(self):
        if not self.is_allowed():
            return
        image = re.fullmatch(r"/images/([\w-]+\.\w+)", self.path)
        file = self.server.choices.out / "images" / image[1] if image else None
        if self.path == "/":
            self.reply("text/html; charset=utf-8", PAGE.read_bytes())
        elif self.path == "/state":
            self.reply_state()
        elif image and file.suffix in TYPES and file.is_file():
            self.reply(TYPES[file.suffix], file.read_bytes())
        else:
            self.send_error(404)

    def do_POST(self):
        if not self.is_allowed():
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
            wanted = json.loads(self.rfile.read(length)) if 0 < length < 1000 else None
            start, turn, choice = wanted["start"], wanted["turn"], wanted["choice"]
            if (self.path != "/choice" or choice not in CHOICES or type(turn) is not int
                    or self.headers.get_content_type() != "application/json"):
                raise ValueError
        except (KeyError, RecursionError, TypeError, ValueError):
            self.send_error(400, "It should be JSON with start, turn and choice")
            return
        try:
            if start == START:
                self.server.choices.choose(turn, choice)
        except dpo.UserError as error:  # the disk is full
            self.send_error(500, "The choice was not written", dpo.one_line(error))
            return
        self.reply_state()


# ----------------------------------------------------------------------------------- command line

def settings(args):
    """The settings of diffusion_dpo.py by which pairs are drawn. Raises UserError.

    Resolution and guidance are those of the policy's run, unless `args` say otherwise.
    """
    run = {}
    if args.policy:
        run, _ = judge.read_run(args.policy)
        args.precision = args.micro_batch = None  # flags of judge.py; here their defaults hold
        cfg = judge.settings(args)
    else:
        # With adapters, which stay off, there is no second copy of the weights for the reference.
        cfg = dpo.parse(["--model", args.model, "--lora", "1", "--lr", "0"])
    cfg.resolution = args.resolution or run.get("resolution") or own_resolution(cfg.model)
    cfg.guidance = args.guidance or cfg.guidance
    if cfg.guidance is None and cfg.resolution <= TINY:
        cfg.guidance = 1.0
    dpo.check_flags(cfg)
    return cfg


def own_resolution(model):
    """The pixels a side for which a model was made. Raises UserError."""
    folder = Path(dpo.find_model(model))
    part = "unet" if (folder / "unet").exists() else "transformer"
    with dpo.blame(f"--model {model}"):
        network, vae = (json.loads((folder / name / "config.json").read_text())
                        for name in (part, "vae"))
        return network["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def training_command(args, cfg):
    """A function of the number of preferences: the command that trains on them.

    cfg is None with --data, where nothing is drawn.
    """
    model = cfg.model if cfg else args.model or "sd15"
    run = name = f"runs/{Path(args.out).resolve().name}"
    number = 2
    while Path(run).exists():  # as in a second round
        run = f"{name}-{number}"
        number += 1

    preset = dpo.find_preset(model)
    own = dpo.PRESETS[preset].get("resolution", dpo.Config.resolution)
    resolution = cfg.resolution if cfg else own
    if not cfg and Path(model).is_dir():  # one of the hub would have to be downloaded first
        resolution = own_resolution(model)
    is_tiny = resolution <= TINY
    flags = FLAGS["tiny" if is_tiny else preset]
    if resolution != own:
        flags += f" --resolution {resolution}"
    model, data, run = map(shlex.quote, [model, args.out, run])
    line = f"python diffusion_dpo.py --model {model} --data {data} {flags} --out {run}"

    def command(preferences):
        steps = max(150, 3 * preferences // 2) if is_tiny else 100
        return f"{line} --steps {steps}"

    return command


def claim_folder(out, note):
    """Note the settings in a folder that is new or empty. Raise UserError if it holds others."""
    if not any(out.glob("[!.]*")):
        dpo.write_json(out / "label.json", note)
    with dpo.blame(f"--out {out}: it holds other files; name a new folder"):
        there = json.loads((out / "label.json").read_text())
        differences = [f"{name} is {there.get(name)} there, {note[name]} here"
                       for name in note if there.get(name) != note[name]]
    if differences:
        raise dpo.UserError(f"--out {out}: it holds other choices, where {'; '.join(differences)}")


def parse(argv=None):
    """The command line as a namespace. Raises UserError."""
    parser = judge.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="sd15, sdxl, sd35, hub id or folder; it draws the pairs. With --data:"
                        " the model in the command that the page shows [sd15]")
    add("--policy", help="folder of a run, whose policy draws instead of its --model")
    add("--prompts", help="text file, a prompt per line [prompts.txt in the model's folder]")
    add("--resolution", type=judge.at_least(8, int), help="pixels a side [the model's own]")
    add("--guidance", type=judge.at_least(1, float),
        help=f"of the drawing [the pipeline's own; 1 for models of up to {TINY} pixels]")
    add("--data", help="show what exists: a preference set, or a folder of images")
    add("--split", default="train", help="part of --data to show [train]")
    add("--pairs", type=judge.at_least(1, int), default=100,
        help="how many to show, of each policy [100]")
    add("--seed", type=int, default=0, help="of noise, sides and second showings [0]")
    add("--port", type=int, default=8100, help="of the page on this machine; 0: any [8100]")
    add("--out", required=True, help="folder of the choices")
    args = parser.parse_args(argv)

    if not (args.data or args.model or args.policy):
        raise dpo.UserError("--model, --policy or --data is missing; it says what is shown")
    for name in ("policy", "prompts", "resolution", "guidance"):
        if args.data and getattr(args, name) is not None:
            raise dpo.UserError(f"--{name}: it has no meaning with --data, which draws nothing")
    if args.split != "train" and not args.data:
        raise dpo.UserError("--split: it has no meaning without --data, of which it names a part")
    return args


def main(argv=None):
    args = parse(argv)
    out = Path(args.out)
    if args.data:
        if out.resolve().is_relative_to(Path(args.data).resolve()):
            raise dpo.UserError(f"--out {out}: it lies in --data; name another folder")
        cfg, source = None, ExistingPairs(args)
    else:
        cfg = settings(args)
        source = DrawnPairs(args, cfg)
        model = Path(cfg.model).resolve()
        if out.resolve().is_relative_to(model) and (model / "model_index.json").exists():
            raise dpo.UserError(f"--out {out}: it lies in --model; name another folder")

    dpo.lock_folder(out)
    names = ("data", "split", "seed", "resolution", "guidance")
    note = {name: getattr(args, name) for name in names}
    claim_folder(out, note | {"prompts": source.prompts, "model": cfg and cfg.model})
    choices = Choices(out, source, args.seed)
    print(f"choices     {len(choices.lines):,} so far, in {out}")
    command = training_command(args, cfg)
    with dpo.blame(f"--port {args.port}: it cannot be used; name another"):
        server = make_server(args.port, choices, command)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    print(f"page        {address}\nstop        by Ctrl-C; the same command resumes")
    if os.environ.get("DISPLAY") or sys.platform == "darwin":  # else lynx might take this terminal
        webbrowser.open(address)

    try:
        for prompt, names in tqdm(source.make(out), "pairs", source.count, ncols=99):
            choices.add(prompt, names)
        choices.end()
        threading.Event().wait()  # the server goes on
    except KeyboardInterrupt:
        print(f"\nchoices     {len(choices.lines):,}, in {choices.file}")


if __name__ == "__main__":
    dpo.run_command(main)
