"""What a run costs, known before anything is downloaded: its memory and its time.

    python toy/cost.py memory                    # a table, computed; seconds, without a GPU
    python toy/cost.py memory --model sdxl --lora 16             # one line of it, for any flags
    python toy/cost.py time --model sdxl         # measured, on the machine that is to train
    torchrun --nproc_per_node 8 toy/cost.py time --model sdxl    # and on several GPUs
    python toy/cost.py time                      # a table of small models; six minutes on two cores

The flags are diffusion_dpo.py's and --timed-steps; sd15, sdxl, sd35 get random weights. The tables
are printed as Markdown and written to toy/cost_memory.json and toy/cost_time.json.

`memory` builds the models on fake tensors: shapes and types without contents. It counts weights,
gradients, the states that the optimizer makes, and as activations what autograd keeps between
forward and backward of one micro-batch in bf16, and autocast's bf16 copies of trained weights. Not
counted: the CUDA context, the allocator's gaps, what the VAE needs while it encodes, and the block
that checkpointing computes again. Loading needs less than training: parts are moved once cast.

`time` takes steps as the script takes them, of at most 4 micro-batches, and writes OUT/time.json.
Times are those of process 0; on a GPU those at which its stream passed the marks, so that nothing
waits to be timed. The loss counts as backward, the exchange of gradients as rest. Memory is the
peak within each part; on a CPU that of the process so far. Between the steps the floor is timed:
forward and backward of the policy and forward of the reference for as many micro-batches that are
in memory; to it comes the optimizer's time. (Workers read on meanwhile: a data wait shorter than
the floor does not show.)
"""

import argparse
import functools
import io
import itertools
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import diffusers
import pyarrow
import pyarrow.parquet
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.benchmark import Timer
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import make_tiny

import diffusion_dpo as dpo

FLAGS = dpo.FLAGS | {
    "data": (dpo.TEXT, dpo.NO, None, "hub id, parquet file, or folder [64 made-up pairs]"),
    "evaluate": (dpo.TEXT, dpo.NO, "not here: training is what costs"),
    "out": (dpo.TEXT, dpo.NO, "runs/cost", "folder for time.json"),
    "timed-steps": (dpo.COUNT, dpo.NO, 10, "steps to time, after 2 that do not count")}
WARM_UP = 2
PARTS = ("data wait", "encode", "reference", "policy forward", "backward", "optimizer", "rest")

MEMORY_ROWS = (
    "--model sd15 --micro-batch 4", "--model sd15 --micro-batch 1 --checkpointing on",
    "--model sd15 --micro-batch 1 --checkpointing on --lora 16", "--model sdxl --micro-batch 2",
    "--model sdxl --micro-batch 1", "--model sdxl --micro-batch 1 --optimizer adamw",
    "--model sdxl --micro-batch 1 --optimizer adamw --lora 16", "--model sd35 --micro-batch 2",
    "--model sd35 --micro-batch 1 --optimizer adafactor --lora 0 --lr 1e-5")
SMALL = make_tiny.TINY["sd15"]
MEDIUM = SMALL | {  # of 6.8M parameters
    "unet": SMALL["unet"] | {"block_out_channels": (80, 160), "layers_per_block": 2},
    "vae": SMALL["vae"] | {"block_out_channels": (32, 64, 64, 64)}}
TIME_ROWS = (  # size, pixels, flags
    ("medium", 128, ""), ("medium", 128, "--cache"), ("medium", 128, "--cache --lora 8"),
    ("tiny", 64, ""), ("tiny", 64, "--cache"), ("tiny", 64, "--cache --compile"))


def parse(argv):
    """dpo.parse with our flags. Raises Refusal."""
    cfg = dpo.parse(argv, FLAGS)
    if cfg.preset == "toy":
        raise dpo.Refusal("--toy: costs a minute; it should be --model sd15 or another")
    return cfg


def build_pipeline(cfg, device):
    """The pipeline of --model: of the published ones the architecture, with random weights."""
    if cfg.model not in make_tiny.PUBLISHED:
        return dpo.load_pipeline(cfg.model)
    torch.manual_seed(cfg.seed)  # the same on every process
    return make_tiny.assemble(**make_tiny.PUBLISHED[cfg.model], device=device)


# --------------------------------------------------------------------------------------- memory

def size(tensors):
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def account(cfg):
    """{part: bytes on a GPU} of a run, computed without its weights."""
    if cfg.compile:
        raise dpo.Refusal("--compile: memory can be computed without it only")
    problem = dpo.StableDiffusion(cfg, torch.device("meta"), build_pipeline(cfg, "meta"))
    policy, parts = problem.policy, problem.pipe.components
    trained = [p for p in policy.parameters() if p.requires_grad]
    frozen = policy if cfg.lora else problem.reference
    helpers = nn.ModuleList(part for name, part in parts.items()
                            if name == "vae" or name.startswith("text_encoder"))
    buffers = size(policy.buffers())  # SD3's positions; with adapters there is one network
    found = {"policy": size(trained) + (0 if cfg.lora else buffers), "gradients": size(trained),
             "reference": size(p for p in frozen.parameters() if not p.requires_grad) + buffers,
             "VAE, text encoders": size(helpers.parameters())}
    cond = problem.encode_prompts(2 * cfg.micro_batch * cfg.draws * ["a prompt"])
    with FakeTensorMode():  # tensors that say they are on the CPU: autocast passes meta by
        for module in policy.modules():
            for name, p in [*module.named_parameters(recurse=False)]:
                fake = torch.empty(p.shape, dtype=p.dtype)
                setattr(module, name, nn.Parameter(fake, p.requires_grad))
            for name, buffer in [*module.named_buffers(recurse=False)]:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        policy.times = torch.empty(len(problem.weight))
        cond = {name: torch.empty(each.shape, dtype=each.dtype) for name, each in cond.items()}
        found["activations"] = kept_by_autograd(policy, problem.shape, cond, cfg)
        if cfg.checkpointing == "on" and cfg.precision == "bf16":  # else autograd has kept them
            found["activations"] += sum(
                2 * p.numel() for module in policy.modules() for p in module.parameters(False)
                if p.requires_grad and isinstance(module, (nn.Linear, nn.Conv2d)))
        optimizer = dpo.make_optimizer([p for p in policy.parameters() if p.requires_grad], cfg)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.empty_like(p)
        optimizer.step()
        found["optimizer"] = size(tensor for state in optimizer.state.values()
                                  for tensor in state.values() if torch.is_tensor(tensor))
    return found


def kept_by_autograd(policy, shape, cond, cfg):
    """Bytes that a forward pass leaves for the backward pass, the policy's parameters not counted:
    of storages, since several saved tensors may share one."""
    own = {p.untyped_storage()._cdata for p in policy.parameters()}
    kept = {}  # the storages are held, or another one could come to lie in the same place

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    n = len(cond["prompt"])
    x_t, t = torch.empty(n, *shape), torch.zeros(n, dtype=torch.int64)

    def as_on_cuda(norm):  # there autocast has these in fp32, on a CPU it does not
        return mock.patch.object(F, norm.__name__, lambda x, *more, **how: norm(
            x.float(), *more, **how))

    with (as_on_cuda(F.group_norm), as_on_cuda(F.layer_norm),
          torch.autocast("cpu", torch.bfloat16, cfg.precision == "bf16"),
          torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)):
        policy(x_t, t, **cond).float().square().sum()
    return sum(storage.nbytes() for storage in kept.values())


def memory(flags):
    """The command `memory`."""
    table = []
    for row in [" ".join(flags)] if flags else MEMORY_ROWS:
        found = account(parse(["--precision", "bf16", *row.split()]))
        gib = {part: count / 2**30 for part, count in found.items()}
        table.append({"GiB": row.removeprefix("--model ")} | gib | {"sum": sum(gib.values())})
    print_table(table)
    if not flags:
        dpo.write_json(ROOT / "toy" / "cost_memory.json", table)


def print_table(rows):
    """Rows of the same keys as Markdown; of a list the median and the range."""
    def cell(value):
        if isinstance(value, list):
            return f"{statistics.median(value):.3f} ({min(value):.3f}-{max(value):.3f})"
        return f"{value:.1f}" if isinstance(value, float) else value

    print("\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(cell, row.values())) + " |")


# ----------------------------------------------------------------------------------------- time

class Clock:
    """When the parts of each step were over, and how much memory each needed."""

    def __init__(self, device):
        self.gpu, self.marks = device.type == "cuda", []  # (part, when, bytes)

    def mark(self, part):
        """Says that `part` is over, which began at the mark before."""
        if self.gpu:
            when, peak = torch.cuda.Event(enable_timing=True), torch.cuda.max_memory_allocated()
            when.record()
            torch.cuda.reset_peak_memory_stats()
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            when = time.perf_counter()
        self.marks.append((part, when, peak))

    def around(self, part, function):
        """`function`, with a mark before it and one after."""
        @functools.wraps(function)
        def marked(*inputs, **more):
            self.mark("rest")
            out = function(*inputs, **more)
            self.mark(part)
            return out
        return marked

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
    """FLOP/s of a large matrix product: what this device can reach."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange().median


def count_flops(policy, x_t, t, cond):
    """FLOPs of a forward pass, counted without making it."""
    times = None if policy.times is None else policy.times.to("meta")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        kind = type(policy.network)
        bare = dpo.NetworkPolicy(kind.from_config(policy.network.config), times)
        cond = {name: value.float().to("meta") for name, value in cond.items()}
        bare(x_t.to("meta"), t.to("meta"), **cond)
    return counter.get_total_flops()


def make_pairs(path, size):
    """Writes 64 pairs of JPEGs of blurred noise, `size` pixels high: to decode and to crop they are
    nearly as much work as photographs, five times that of make_tiny's plain shapes."""
    def jpeg(*key):
        noise = 255 * torch.rand(32, 40, 3, generator=dpo.generator(*key))
        image = Image.fromarray(noise.byte().numpy()).resize((size * 5 // 4, size))
        image.save(file := io.BytesIO(), "JPEG")
        return file.getvalue()

    rows = [{"caption": f"prompt {row}", "label_0": 1.0, "jpg_0": jpeg(row, 0),
             "jpg_1": jpeg(row, 1)} for row in range(64)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def inputs_in_memory(problem, cfg):
    """What the networks take for one micro-batch: x_t (2BK, *shape), t (2BK,), cond."""
    rows = [(0, row % len(problem.pairs)) for row in range(cfg.micro_batch)]
    x_w, x_l, cond = problem.encode(default_collate([problem.pairs[row] for row in rows]))
    x_t = torch.cat([x_w, x_l]).repeat_interleave(cfg.draws, 0)
    t = torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)
    return x_t, t, {name: each.repeat_interleave(cfg.draws, 0) for name, each in cond.items()}


def time_steps(cfg, device):
    """Takes WARM_UP + cfg.timed_steps steps; nothing is saved. Returns the numbers of time.json.
    Raises Refusal if --data has too many unreadable pairs, and Stop as train_step does."""
    rank, world = dpo.rank_and_world()
    accumulation = min(4, cfg.batch // (cfg.micro_batch * world))
    few = argparse.Namespace(**vars(cfg) | {
        "batch": accumulation * cfg.micro_batch * world, "steps": WARM_UP + cfg.timed_steps})
    with tempfile.TemporaryDirectory() as folder:
        if not cfg.data:
            few.data = f"{folder}/pairs.parquet"
            make_pairs(few.data, cfg.resolution)
        if cfg.cache and cfg.model in make_tiny.PUBLISHED:
            few.cache = f"{cfg.cache}/random"  # or a run would take these latents for its model's
        problem = dpo.StableDiffusion(few, device, build_pipeline(cfg, device),
                                      dpo.ImagePairs(few, cfg.split))
    policy = problem.policy
    optimizer = dpo.make_optimizer([p for p in policy.parameters() if p.requires_grad], cfg)

    x_t, t, cond = inputs_in_memory(problem, cfg)
    reference, clock = problem.reference, Clock(device)

    def end_of_forward(*_):
        if torch.is_grad_enabled():  # with adapters the reference is the policy, too
            clock.mark("policy forward")

    policy.register_forward_hook(end_of_forward)
    problem.encode = clock.around("encode", problem.encode)
    problem.reference = clock.around("reference", reference)
    optimizer.step = clock.around("optimizer", optimizer.step)
    micro_step = clock.around("backward", dpo.dpo_step)  # what is left of it at its end
    read = dpo.load_batches(problem, few, 0).__next__
    batches = iter(clock.around("data wait", read), None)  # an iterator that calls read

    unreadable = 0
    clock.mark("start")
    for step in tqdm(range(few.steps), "steps", ncols=99, disable=rank > 0):
        row = dpo.train_step(problem, optimizer, batches, few, step, micro_step)
        unreadable += row["unreadable"]
        clock.mark("rest")
        for _ in range(accumulation):
            with dpo.autocast(problem):
                with torch.no_grad():
                    reference(x_t, t, **cond)
                out = policy.forward(x_t, t, **cond)  # past the hook
            out.float().square().mean().backward()  # the next step begins with gradients of 0
        clock.mark("floor")
    if unreadable > max(1, few.steps * few.batch / 100):
        raise dpo.Refusal(f"--data {cfg.data}: {unreadable} pairs, over 1 %, are unreadable")

    # Forward 1, backward 2 (1 to the adapters), reference 1; what checkpointing repeats is no use.
    flops = (3 if cfg.lora else 4) * count_flops(policy, x_t, t, cond) * accumulation
    rate = matmul_rate(device, torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
    return summary(cfg, few, *clock.read(), flops, rate)


def summary(cfg, few, steps, peaks, flops, rate):
    """time.json, from {part: seconds} of steps, {part: bytes}, the useful FLOPs of a step, and the
    FLOP/s of a matrix product."""
    steps = steps[WARM_UP:]
    floors = [step.pop("floor") + step["optimizer"] for step in steps]
    ratios = [sum(step.values()) / floor for step, floor in zip(steps, floors, strict=True)]
    parts = {part: statistics.mean(step[part] for step in steps) for part in PARTS}
    peaks = {part: peaks[part] for part in PARTS}
    whole = parts["all"] = sum(parts.values())
    peaks["all"] = max(peaks.values())
    # A step of the run has more micro-batches, and still one exchange of gradients and one update.
    once = parts["rest"] + parts["optimizer"]
    step = cfg.batch / few.batch * (whole - once) + once
    gpu = torch.cuda.is_available()
    return {"ratio_to_floor": statistics.median(ratios),
            "seconds_per_pair": whole / few.batch, "seconds_per_step": step,
            "projected_hours": cfg.steps * step / 3600,
            "tflops": flops / whole / 1e12, "matmul_tflops": rate / 1e12,
            "share_of_matmul": flops / whole / rate,
            "milliseconds_per_pair": {part: 1000 * parts[part] / few.batch for part in parts},
            "share": {part: parts[part] / whole for part in parts},
            "peak_memory_gib": {part: peaks[part] / 2**30 for part in peaks},
            "device": torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores",
            "torch": torch.__version__, "world_size": dpo.rank_and_world()[1],
            "timed_batch": few.batch, "config": vars(cfg)}


def report(cfg, found):
    """Prints time.json."""
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
    """The command `time` without flags: the median of three seeds, and their range. Times on a CPU
    say nothing about a GPU; how far the loop is from its floor carries over, and gets closer to 1
    the larger the model is."""
    table, shown = [], ("ratio_to_floor", "share_of_matmul", "seconds_per_pair")
    with tempfile.TemporaryDirectory() as folder:
        for kind, sizes, pixels in ("medium", MEDIUM, 128), ("tiny", SMALL, 64):
            make_tiny.assemble(**sizes).save_pretrained(f"{folder}/{kind}")
            make_pairs(f"{folder}/{kind}.parquet", pixels)
        for kind, pixels, flags in TIME_ROWS:
            argv = (f"--model {folder}/{kind} --data {folder}/{kind}.parquet --resolution {pixels}"
                    f" --micro-batch 2 --timed-steps 8 {flags}")
            argv = argv.replace("--cache", f"--cache {folder}/cache").split()
            runs = [time_steps(parse([*argv, "--seed", str(seed)]), torch.device("cpu"))
                    for seed in range(3)]
            table.append({"UNet": kind, "flags": flags or "none"} | {
                name: sorted(run[name] for run in runs) for name in shown})
    print_table(table)
    dpo.write_json(ROOT / "toy" / "cost_time.json", table)


def measure(flags):
    """The command `time`."""
    if not flags:
        return time_table()
    cfg = parse(flags)
    device = dpo.start_processes(torch.cuda.is_available())
    try:
        found = time_steps(cfg, device)
    except dpo.Stop as stop:
        print(f"Nothing is timed. {stop.args[0].partition('. ')[0]}.")
        sys.exit(stop.args[1])
    if dpo.rank_and_world()[0] == 0:
        report(cfg, found)
        dpo.write_json(Path(cfg.out, "time.json"), found)


def main(argv=None):
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    with dpo.command():
        command, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
        if command in ("-h", "--help"):
            print(__doc__)
        elif command == "memory":
            memory(flags)
        elif command == "time":
            measure(flags)
        else:
            raise dpo.Refusal(f"{command}: it should be memory or time; --help says more")


if __name__ == "__main__":
    main()
