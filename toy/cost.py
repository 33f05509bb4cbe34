"""What a run costs, known before anything is downloaded: its memory and its time.

    python toy/cost.py memory                    # a table, computed in minutes without a GPU
    python toy/cost.py memory --model sdxl --lora 16             # one line of it, for any flags
    python toy/cost.py time --model sdxl         # measured, on the machine that is to train
    torchrun --nproc_per_node 8 toy/cost.py time --model sdxl    # and on several GPUs
    python toy/cost.py time                      # a table of small models, in a few minutes

The flags are those of diffusion_dpo.py, and --encoded and --timed-steps. The models sd15, sdxl and
sd35 get random weights. The tables are printed as Markdown and written to toy/cost_memory.json and
toy/cost_time.json.

`memory` runs one step, one evaluation and one picture on fake tensors, which have shapes and types
without contents. It adds up the bytes of those that are alive. So nothing is computed, and the code
is that of the training. Its columns are in GiB:

    held         what stays: weights, gradients, and the states of the optimizer
    peak, at     the peak of a step, and the part of the step where it is
    evaluation   the peak of an evaluation on held-out pairs
    picture      the peak while images are sampled and decoded, as many as --micro-batch at once
    host         the peak on the CPU while a process loads its model, whose files are in fp32

Not counted are the CUDA context (about 0.5 GiB), gaps of the allocator (5 to 10 %), workspaces of
convolutions, and on the host the libraries and the workers that read images.

`time` runs the training loop of diffusion_dpo.py with at most 4 micro-batches per step, and writes
OUT/time.json. Times are those of process 0. On a GPU they are taken when its stream passes the
marks, so nothing has to wait. The loss counts as backward. The exchange of gradients counts as
rest. Memory is the peak within each part; on a CPU it is the peak of the process so far.

The floor is timed between the steps: forward and backward of the policy and forward of the
reference, for as many micro-batches, which are in memory already. The optimizer's time is added.
Workers read on meanwhile, so a wait for data does not show if it is shorter than the floor.
"""

import functools
import io
import itertools
import math
import os
import random
import re
import resource
import statistics
import sys
import tempfile
import time
import weakref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pyarrow.parquet
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import encode
import figure
import make_tiny

import diffusion_dpo as dpo

WARM_UP = 2  # steps that are not timed
PARTS = ("data wait", "encode", "reference", "policy forward", "backward", "optimizer", "rest")
MEMORY_FLAGS = "--micro-batch 1 --model"  # of all rows
MEMORY_ROWS = """\
sdxl --lora 16 --optimizer adamw --encoded
sdxl --lora 16 --optimizer adamw
sd35 --micro-batch 2 --encoded
sd35 --micro-batch 2
sd15 --micro-batch 2 --lora 16 --encoded
sd15 --micro-batch 2 --lora 16
sd15 --checkpointing --optimizer adafactor --encoded
sd15 --checkpointing --optimizer adafactor
sd15 --checkpointing --encoded
sd15 --checkpointing
sd15 --micro-batch 4
sd35 --lora 0 --optimizer adafactor --encoded
sd35 --lora 0 --optimizer adafactor
sdxl --encoded
sdxl
sdxl --micro-batch 2
sdxl --optimizer adamw --encoded
sdxl --optimizer adamw"""
TIME_ROWS = (("medium", 128, "images", ""), ("medium", 128, "encoded", ""),
             ("medium", 128, "encoded", "--lora 8"),
             ("tiny", 64, "images", ""), ("tiny", 64, "encoded", ""))
SMALL = make_tiny.TINY["sd15"]
MEDIUM = SMALL | {  # 6.8M parameters
    "unet": SMALL["unet"] | {"block_out_channels": (80, 160), "layers_per_block": 2},
    "vae": SMALL["vae"] | {"block_out_channels": (32, 64, 64, 64)},
}


@dataclass
class Config(dpo.Config):
    """The flags of diffusion_dpo.py, and two more."""

    data: str = None  # hub id, parquet or JSON file, or folder [64 made-up pairs]
    out: str = "runs/cost"  # folder for time.json
    encoded: bool = False  # memory: as if toy/encode.py had encoded the data
    timed_steps: int = 10  # steps to time, after 2 that do not count
    lr: float = 1e-5


def parse(argv):
    """dpo.parse with our flags. Raises UserError."""
    if "--toy" in argv or "--evaluate" in argv:
        raise dpo.UserError("--toy, --evaluate: it should be the training of a --model")
    cfg = dpo.parse(argv, Config)
    if cfg.timed_steps < 1:
        raise dpo.UserError(f"--timed-steps {cfg.timed_steps}: it should be at least 1")
    return cfg


def build_pipeline(cfg, device):
    """The pipeline of --model. A published one gets its architecture and random weights."""
    if cfg.model not in make_tiny.PUBLISHED:
        return dpo.load_pipeline(cfg.model)
    logging.set_verbosity_error()
    torch.manual_seed(cfg.seed)  # the same on every process
    return make_tiny.assemble(**make_tiny.PUBLISHED[cfg.model], device=device)


class Marks:
    """Marks the ends of the parts of a step. A subclass has mark(part)."""

    def around(self, part, function):
        """`function`, with a mark before it and one after it."""
        @functools.wraps(function)
        def marked(*inputs, **options):
            self.mark("rest")
            out = function(*inputs, **options)
            self.mark(part)
            return out
        return marked

    def mark_parts(self, task):
        """dpo.dpo_step for `task`, with a mark after each of its parts."""
        def after_forward(*_):
            if torch.is_grad_enabled():  # with adapters the reference is a forward of the policy
                self.mark("policy forward")

        task.policy.register_forward_hook(after_forward)
        task.encode = self.around("encode", task.encode)
        task.reference = self.around("reference", task.reference)
        return self.around("backward", dpo.dpo_step)  # what is left of it at its end


def drop_encoders(pipe):
    """Leave out what a run does not load if its data were encoded ahead."""
    for name in pipe.components:
        if re.match(dpo.ENCODERS, name):
            setattr(pipe, name, None)


# --------------------------------------------------------------------------------------- memory

class MemoryMeter(Marks, TorchDispatchMode):
    """Within it, the bytes of all tensors that are alive are counted.

    torch.distributed has MemTracker for that. But it puts a hook on every weight, and a frozen
    weight takes none.
    """

    def __init__(self):
        super().__init__()
        self.sizes = {}  # {weak reference to a storage: bytes}
        self.live = self.peak = 0  # bytes
        self.peaks = []  # (bytes, part)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()  # several tensors may share one
                key = weakref.ref(storage, self.forget)
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return out

    def forget(self, key):
        self.live -= self.sizes.pop(key)

    def mark(self, part):
        """Say that `part` is over. It began at the mark before."""
        self.peaks.append((self.peak, part))
        self.peak = self.live

    def highest(self, part):
        """The highest peak up to the end of `part`, since the last call, and where it was."""
        self.mark(part)
        peaks, self.peaks = self.peaks, []
        return max(peaks)


def moved_as_fakes(fake):
    """Within it, modules that are moved to the "cpu" get fake tensors, which say they are there.

    They come from the device "meta", where weights have no contents either. But autocast passes
    over tensors on "meta".
    """
    to = nn.Module.to

    def move(module, where, *more, **options):
        if where != torch.device("cpu"):
            return to(module, where, *more, **options)
        if next(module.parameters()).is_meta:  # a network with adapters is moved twice
            with fake:
                to(module, where, *more, **options)
            if hasattr(module, "tie_weights"):  # T5 has one table under two names
                module.tie_weights()
        return module

    return mock.patch.object(nn.Module, "to", move)


def as_on_cuda(norm):
    """Within it, autocast computes `norm` in fp32, which on a CPU it does not."""
    def in_fp32(x, *more, **options):
        return norm(x.float() if torch.is_autocast_enabled("cpu") else x, *more, **options)
    return mock.patch.object(F, norm.__name__, in_fp32)


def blank_pairs(cfg, pipe):
    """Stands in for the data of a run: a micro-batch without contents, and the shape of a latent.

    With --encoded it holds what `pipe`, whose weights are on "meta", makes of images and prompts.
    """
    images = torch.zeros(2, 3, cfg.resolution, cfg.resolution, dtype=torch.uint8)
    pair, shape = {"images": images, "prompt": ""}, None
    if cfg.encoded:
        dpo.prepare_encoders(pipe, cfg, "meta")
        latents = torch.zeros(dpo.encode_images(pipe, images.to("meta")).shape)
        cond = dpo.encode_prompts(pipe, [""], cfg.resolution)
        cond = {name: torch.zeros_like(one[0], device="cpu") for name, one in cond.items()}
        pair, shape = {"latents": latents, "cond": cond}, latents.shape[1:]
    pair |= {"epoch": 0, "row": 0, "unreadable": 0.0}
    return SimpleNamespace(batch=default_collate(cfg.micro_batch * [pair]), shape=shape)


def take_step(task, optimizer, meter):
    """Take a step as dpo.train does, one that is not the first."""
    cfg, parameters = task.cfg, optimizer.param_groups[0]["params"]
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer.step()  # the first one, which makes the optimizer's states
    meter.mark("optimizer")

    if cfg.batch == cfg.micro_batch:  # if not, gradients of other micro-batches are there
        optimizer.zero_grad()
    micro_step = meter.mark_parts(task)
    micro_step(task, task.pairs.batch, cfg)
    nn.utils.clip_grad_norm_(parameters, 1.0)


@torch.no_grad()
def take_pass(task, draws):
    """What an evaluation does with a micro-batch, and `draws` for each pair."""
    dpo.batch_errors(task, task.pairs.batch, draws, 0)


def account(cfg):
    """{column: bytes} of a run, and the part of a step where its peak is."""
    whole = cfg.encoded and build_pipeline(cfg, "meta").to("meta")
    pairs = blank_pairs(cfg, whole)
    meter, fake = MemoryMeter(), FakeTensorMode(allow_non_fake_inputs=True)
    with meter, moved_as_fakes(fake), as_on_cuda(F.group_norm), as_on_cuda(F.layer_norm):
        pipe = build_pipeline(cfg, "meta").to("meta")
        if cfg.encoded:
            drop_encoders(pipe)
        meter.highest("before loading")
        task = dpo.StableDiffusion(cfg, torch.device("cpu"), pipe, pairs)
        host, _ = meter.highest("loading")
        weights = meter.live

        trained = [p for p in task.policy.parameters() if p.requires_grad]
        optimizer = dpo.make_optimizer(trained, cfg)
        with fake:
            take_step(task, optimizer, meter)
            peak, at = meter.highest("rest")
            states = meter.live - weights
            take_pass(task, math.gcd(cfg.draws, dpo.EVAL_DRAWS))
            evaluation, _ = meter.highest("evaluation")

        with (mock.patch.object(dpo, "load_pipeline", lambda *_, **__: whole),
              figure.all_parts(task), fake):
            take_pass(task, 1)  # figure.py samples as many x_t at once, and encodes no images
            meter.peaks = [each for each in meter.peaks if "encode" not in each]
            task.pipe.vae.decode(torch.empty(cfg.micro_batch, *task.shape))
        picture, _ = meter.highest("picture")
    return {"weights": weights, "states": states, "peak": peak,
            "at": at.removeprefix("policy "), "evaluation": evaluation, "picture": picture,
            "host": host}


def memory(flags):
    """The command `memory`."""
    head, rows = MEMORY_FLAGS, MEMORY_ROWS.splitlines()
    if flags:
        head, rows = "", [" ".join(flags)]
    table = []
    for row in tqdm(rows, "memory", ncols=99, leave=False):
        found = account(parse(["--precision", "bf16", *head.split(), *row.split()]))
        found = {"held": found.pop("weights") + found.pop("states")} | found
        gib = {name: value if name == "at" else value / 2**30 for name, value in found.items()}
        table.append({head or "flags": row} | gib)
    print_table(table)
    if not flags:
        dpo.write_json(ROOT / "toy" / "cost_memory.json", table)


def print_table(rows):
    """Rows of the same keys as Markdown. Of a list it shows the median and the range."""
    def cell(value):
        if isinstance(value, list):
            return f"{statistics.median(value):.3f} ({min(value):.3f}-{max(value):.3f})"
        return f"{value:.1f}" if isinstance(value, float) else value

    print("\n| " + " | ".join(rows[0]) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(cell, row.values())) + " |")


# ----------------------------------------------------------------------------------------- time

class Clock(Marks):
    """When the parts of each step were over, and how much memory each of them needed."""

    def __init__(self, device):
        self.gpu = device.type == "cuda"
        self.marks = []  # (part, when, bytes)

    def mark(self, part):
        """Say that `part` is over. It began at the mark before."""
        if self.gpu:
            when = torch.cuda.Event(enable_timing=True)
            when.record()
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            when = time.perf_counter()
            unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.marks.append((part, when, peak))

    def read(self):
        """[{part: seconds} of each step], which ends with its floor, and {part: bytes}."""
        if self.gpu:
            torch.cuda.synchronize()
        steps, peaks = [{}], {}
        for (_, before, _), (part, when, peak) in itertools.pairwise(self.marks):
            seconds = before.elapsed_time(when) / 1000 if self.gpu else when - before
            steps[-1][part] = steps[-1].get(part, 0) + seconds
            peaks[part] = max(peaks.get(part, 0), peak)
            if part == "floor":
                steps.append({})
        return steps[:-1], peaks


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product, which is what this device can reach."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange().median


def count_flops(policy, x_t, t, cond):
    """FLOPs of a forward pass, counted on meta tensors."""
    network = policy.network
    times = policy.times.to("meta")
    cond = {name: value.float().to("meta") for name, value in cond.items()}
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        bare = dpo.Denoiser(type(network).from_config(network.config), times)
        bare(x_t.to("meta"), t.to("meta"), **cond)
    return counter.get_total_flops()


def make_pairs(path, height):
    """Write 64 pairs of JPEGs of blurred noise, `height` pixels high.

    They are nearly as much work to decode and to crop as photographs.
    """
    rng = random.Random(0)

    def jpeg():
        noise = Image.frombytes("RGB", (40, 32), rng.randbytes(3 * 40 * 32))
        file = io.BytesIO()
        noise.resize((height * 5 // 4, height)).save(file, "JPEG")
        return file.getvalue()

    rows = [{"caption": f"prompt {row}", "label_0": 1.0, "jpg_0": jpeg(), "jpg_1": jpeg()}
            for row in range(64)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def train_by_the_clock(task, clock):
    """Run dpo.train with a mark after each part of a step, and with the floor after each step.

    Returns the inputs of the policy's last forward, as a tuple and a dict.
    """
    cfg, policy, reference = task.cfg, task.policy, task.reference
    make_optimizer, load_batches = dpo.make_optimizer, dpo.load_batches
    last_inputs = []

    def keep_inputs(module, *inputs):
        last_inputs[:] = inputs

    def floor():
        inputs, cond = last_inputs
        for _ in range(cfg.batch // (cfg.micro_batch * dpo.rank_and_world()[1])):
            with dpo.autocast(task):
                with torch.no_grad():
                    reference(*inputs, **cond)
                out = policy.forward(*inputs, **cond)  # past the hook
            out.float().square().mean().backward()  # the next step sets these gradients to 0

    def timed_optimizer(*given):
        optimizer = make_optimizer(*given)
        step = clock.around("optimizer", optimizer.step)

        def step_and_floor():
            step()
            floor()
            clock.mark("floor")

        optimizer.step = step_and_floor
        return optimizer

    def timed_batches(*given):
        read = iter(load_batches(*given)).__next__
        return iter(clock.around("data wait", read), None)  # an iterator that calls read

    policy.register_forward_pre_hook(keep_inputs, with_kwargs=True)
    micro_step = clock.mark_parts(task)
    task.content = dict  # random weights have no folder to tell them by
    task.save = lambda folder: folder.mkdir()  # the end of a run would write all weights
    with mock.patch.multiple(dpo, make_optimizer=timed_optimizer, load_batches=timed_batches,
                             save_checkpoint=mock.DEFAULT):  # and a stop writes no checkpoint
        clock.mark("start")
        dpo.train(task, cfg, micro_step)
    return last_inputs


def time_steps(cfg, device):
    """Take WARM_UP + cfg.timed_steps steps. Returns the numbers of time.json.

    Raises UserError and SystemExit as dpo.train does.
    """
    _, world = dpo.rank_and_world()
    accumulation = min(4, cfg.batch // (cfg.micro_batch * world))
    with tempfile.TemporaryDirectory() as folder:
        few = replace(cfg, batch=accumulation * cfg.micro_batch * world, out=f"{folder}/run",
                      steps=WARM_UP + cfg.timed_steps, save_every=0, eval_every=0, sample_every=0)
        if not cfg.data:
            few.data = f"{folder}/pairs.parquet"
            make_pairs(few.data, cfg.resolution)
        pairs = dpo.open_pairs(few, cfg.split)
        pipe = build_pipeline(cfg, device)
        if pairs.encoded:
            drop_encoders(pipe)
        task = dpo.StableDiffusion(few, device, pipe, pairs)
        clock = Clock(device)
        inputs, cond = train_by_the_clock(task, clock)

    # Forward 1, backward 2 (1 to the adapters), reference 1. What checkpointing repeats is no use.
    flops = (3 if cfg.lora else 4) * accumulation * count_flops(task.policy, *inputs, cond)
    rate = matmul_rate(device, torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
    return summary(cfg, few, *clock.read(), flops, rate)


def summary(cfg, few, steps, peaks, flops, rate):
    """time.json, from [{part: seconds} of each step], {part: bytes}, the useful FLOPs of a step,
    and the FLOP/s of a matrix product."""
    steps = steps[WARM_UP:]
    floors = [step.pop("floor") + step["optimizer"] for step in steps]
    ratios = [sum(step.values()) / floor for step, floor in zip(steps, floors, strict=True)]
    parts = {part: statistics.mean(step[part] for step in steps) for part in PARTS}
    peaks = {part: peaks[part] / 2**30 for part in PARTS}
    whole = parts["all"] = sum(parts.values())
    peaks["all"] = max(peaks.values())

    # A step of the run has more micro-batches, and still one exchange of gradients and one update.
    once = parts["rest"] + parts["optimizer"]
    seconds_per_step = cfg.batch / few.batch * (whole - once) + once
    gpu = torch.cuda.is_available()
    return {
        "ratio_to_floor": statistics.median(ratios),
        "seconds_per_pair": whole / few.batch,
        "seconds_per_step": seconds_per_step,
        "projected_hours": cfg.steps * seconds_per_step / 3600,
        "tflops": flops / whole / 1e12,
        "matmul_tflops": rate / 1e12,
        "share_of_matmul": flops / whole / rate,
        "milliseconds_per_pair": {part: 1000 * parts[part] / few.batch for part in parts},
        "share": {part: parts[part] / whole for part in parts},
        "peak_memory_gib": peaks,
        "device": torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "world_size": dpo.rank_and_world()[1],
        "timed_batch": few.batch,
        "config": asdict(cfg),
    }


def report(cfg, found):
    """Print time.json."""
    print(f"\n{'part of a step':18}{'ms per pair':>14}{'share':>10}{'peak memory (GiB)':>20}")
    for part, milliseconds in found["milliseconds_per_pair"].items():
        print(f"{part:18}{milliseconds:14.2f}{found['share'][part]:10.1%}"
              f"{found['peak_memory_gib'][part]:20.2f}")
    print(f"\nratio to the floor  {found['ratio_to_floor']:.3f}  (floor: forward and backward,"
          " reference, optimizer; all in memory)\n"
          f"useful TFLOP/s      {found['tflops']:.3g}, {found['share_of_matmul']:.0%} of the"
          f" {found['matmul_tflops']:.3g} of a matrix product in {cfg.precision}\n"
          f"this run            {cfg.steps:,} steps of {cfg.batch:,} pairs:"
          f" {found['projected_hours']:,.1f} hours on {found['world_size']} x {found['device']}\n"
          f"numbers             {cfg.out}/time.json")


def time_table():
    """The command `time` without flags: three seeds of small models, on images and encoded ahead.

    Times on a CPU say nothing about a GPU. How far the loop is from its floor carries over, and it
    gets closer to 1 the larger the model is.
    """
    table, shown = [], ("ratio_to_floor", "share_of_matmul", "seconds_per_pair")
    with tempfile.TemporaryDirectory() as folder:
        for kind, sizes, pixels in ("medium", MEDIUM, 128), ("tiny", SMALL, 64):
            make_tiny.assemble(**sizes).save_pretrained(f"{folder}/{kind}")
            images = Path(folder, f"{kind}-images")
            images.mkdir()
            make_pairs(images / "pairs.parquet", pixels)
            encode.main(f"--model {folder}/{kind} --data {images} --resolution {pixels}"
                        f" --out {folder}/{kind}-encoded".split())
        for kind, pixels, data, flags in TIME_ROWS:
            argv = (f"--model {folder}/{kind} --data {folder}/{kind}-{data} --resolution {pixels}"
                    f" --micro-batch 2 --timed-steps 8 {flags}").split()
            runs = [time_steps(parse([*argv, "--seed", str(seed)]), torch.device("cpu"))
                    for seed in range(3)]
            numbers = {name: sorted(run[name] for run in runs) for name in shown}
            table.append({"UNet": kind, "data": data, "flags": flags or "none"} | numbers)
    print_table(table)
    dpo.write_json(ROOT / "toy" / "cost_time.json", table)


def measure(flags):
    """The command `time`."""
    if not flags:
        return time_table()
    cfg = parse(flags)
    if cfg.encoded:
        raise dpo.UserError("--encoded is for memory; time sees by --data whether it is encoded")
    device = dpo.start_processes(torch.cuda.is_available(), cfg.precision)
    try:
        found = time_steps(cfg, device)
    except SystemExit:  # dpo.train says that its steps are saved
        dpo.print_once("But this was only to be timed: nothing was timed, and nothing is saved.")
        raise
    if dpo.rank_and_world()[0] == 0:
        report(cfg, found)
        dpo.write_json(Path(cfg.out, "time.json"), found)


def main(argv=None):
    command, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
    elif command == "memory":
        memory(flags)
    elif command == "time":
        measure(flags)
    else:
        raise dpo.UserError(f"{command}: it should be memory or time; --help says more")


if __name__ == "__main__":
    dpo.run_command(main)
